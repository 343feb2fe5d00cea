"""Ollama's endpoints under ``/api``: chat, generate, embed, tags, show, ps, version; streams are lines of JSON."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response, StreamingResponse

from loramix.defaults import __version__
from loramix.errors import LoramixError, UsageError
from loramix.server import protocol as m
from loramix.server.body_types import limit_of, sampling_of
from loramix.server.chat_messages import plain
from loramix.server.ollama.bodies import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    Generated,
    ShowBody,
)
from loramix.server.openai.replies import Score, score_list
from loramix.server.queued_request import QueuedRequest
from loramix.server.service import Events, Service, Whole, giving_up, report, shortened, unless_left

Form = Callable[[str], dict[str, Any]]
NS = 1_000_000_000
OLLAMA_VERSION = "0.13.0"
"""Of the Ollama whose requests are understood here; some of its clients refuse older ones."""


def router(service: Service) -> APIRouter:
    """The endpoints, on a service."""
    api = APIRouter(prefix="/api")

    async def answer(
        request: Request, body: Generated, messages: list[dict[str, str]], form: Form
    ) -> Response:
        service.target(body.model, body.loramix)
        if not messages:  # how Ollama's clients load a model
            return JSONResponse({**_head(body.model), **form(""), "done": True, "done_reason": "load"})
        options = body.options
        asked = m.Answer(
            number=0,
            messages=messages,
            options=service.options(
                body.model,
                body.loramix,
                max_tokens=limit_of(options.num_predict, service.n_ctx),
                stop=options.stop or (),
                top_logprobs=body.top_logprobs if body.logprobs else None,
                json_schema=body.schema_for_grammar(),
                **sampling_of(options),
            ),
            whole=not body.stream,
        )
        jobs = service.submit([asked])
        if body.stream:
            try:
                begun = await unless_left(request, service.begin(jobs[0]))
            except BaseException:
                service.supervisor.leave(jobs[0])
                raise
            lines = _lines(service, jobs[0], begun, body.model, form)
            return StreamingResponse(lines, media_type="application/x-ndjson")
        async with giving_up(service, jobs):
            whole = await unless_left(request, service.whole(jobs[0]))
        return JSONResponse(
            {**_head(body.model), **form(whole.text), **_scores(whole.scores), **_tail(whole, jobs[0])}
        )

    @api.post("/chat")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await answer(
            request,
            body,
            plain(body.messages),
            lambda text: {"message": {"role": "assistant", "content": text}},
        )

    @api.post("/generate")
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Answer a prompt."""
        messages = [{"role": "system", "content": body.system}] if body.system and body.prompt else []
        messages += [{"role": "user", "content": body.prompt}] if body.prompt else []
        return await answer(request, body, messages, lambda text: {"response": text})

    @api.post("/embed")
    async def embed(body: EmbedBody, request: Request) -> Response:
        """Vectors of texts."""
        service.target(body.model)
        began = time.perf_counter()
        asked = m.Embed(number=0, texts=body.input, truncate=body.truncate)
        result = await unless_left(request, service.result(asked))
        return JSONResponse(
            {
                "model": body.model,
                "embeddings": shortened(result.value, body.dimensions),
                "total_duration": int((time.perf_counter() - began) * NS),
                "load_duration": 0,
                "prompt_eval_count": result.tokens,
            }
        )

    @api.post("/embeddings")
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """Vector of one text, as older clients ask for it."""
        service.target(body.model)
        asked = m.Embed(number=0, texts=[body.prompt], truncate=True)
        return JSONResponse({"embedding": (await unless_left(request, service.result(asked))).value[0]})

    @api.get("/tags")
    async def tags() -> dict[str, Any]:
        """Names that can be asked."""
        return {"models": [model(name) for name in service.models]}

    @api.get("/ps")
    async def ps() -> dict[str, Any]:
        """What is in memory: all of it, for good."""
        extra = {"size_vram": 0, "expires_at": "9999-12-31T23:59:59Z", "context_length": service.n_ctx}
        return {"models": [{**model(service.pack.name), **extra}] if service.supervisor.ready else []}

    @api.post("/show")
    async def show(body: ShowBody) -> dict[str, Any]:
        """A model's details."""
        name = body.model or body.name
        if not name:
            raise UsageError("model is missing; it must be a model's name, as /api/tags lists them.")
        service.target(name)
        _, _, part = name.partition(":")
        manifest = service.pack.manifest
        known = {skill.name: skill for skill in service.pack.skills}
        return {
            "license": manifest.license,
            "modelfile": f"# {known[part].description if part in known else manifest.description}\n",
            "parameters": f"num_predict {known[part].max_tokens}" if part in known else "",
            "template": service.base.template,
            "details": service.base.details,
            "model_info": {
                **service.base.info,
                f"{service.base.info.get('general.architecture', 'llama')}.context_length": service.n_ctx,
                "loramix.skills": list(known),
            },
            "capabilities": ["completion", "embedding"],
            "modified_at": _time(service.started),
        }

    @api.get("/version")
    async def version() -> dict[str, str]:
        """An Ollama version that its clients accept, and ours."""
        return {"version": OLLAMA_VERSION, "loramix": __version__}

    def model(name: str) -> dict[str, Any]:
        return {
            "name": name,
            "model": name,
            "modified_at": _time(service.started),
            "size": service.base.size,
            "digest": service.pack.manifest.base.sha256,
            "details": service.base.details,
        }

    return api


async def _lines(
    service: Service, job: QueuedRequest, begun: Events, model: str, form: Form
) -> AsyncIterator[bytes]:
    """Lines of an answer; the last one has ``done``, or is an error."""
    whole = Whole()
    try:
        async for event in begun:
            whole.add(event)
            if isinstance(event, m.Said) and event.text:
                yield _line({**_head(model), **form(event.text), **_scores(event.scores), "done": False})
        yield _line({**_head(model), **form(""), **_tail(whole, job)})
    except LoramixError as error:
        yield _line({"error": str(error), "done": True})
    finally:
        service.supervisor.leave(job)


def _head(model: str) -> dict[str, Any]:
    return {"model": model, "created_at": datetime.now(UTC).isoformat()}


def _scores(scores: Sequence[Score]) -> dict[str, Any]:
    return {"logprobs": score_list(scores)} if scores else {}


def _tail(whole: Whole, job: QueuedRequest) -> dict[str, Any]:
    """The end of an answer: counts, nanoseconds, and the route."""
    assert whole.ended is not None
    usage, timings = whole.ended.usage, whole.ended.timings
    first = timings["first_token"]
    return {
        "done": True,
        "done_reason": whole.ended.finish_reason,
        "total_duration": int((timings["total"] + job.waited) * NS),
        "load_duration": int(job.waited * NS),
        "prompt_eval_count": usage["prompt_tokens"],
        "prompt_eval_duration": int(first * NS),
        "eval_count": usage["completion_tokens"],
        "eval_duration": int((timings["total"] - first) * NS),
        "loramix": report(whole, job.waited),
    }


def _line(content: dict[str, Any]) -> bytes:
    return msgspec.json.encode(content) + b"\n"


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
