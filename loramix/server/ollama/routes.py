"""Ollama's endpoints under ``/api``: chat, generate, embed, tags, show, ps, version; streams are JSON lines."""

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
from loramix.runtime.answer import ScoredToken
from loramix.server import protocol as m
from loramix.server.body_types import limit_of, sampling_of
from loramix.server.chat_messages import engine_messages
from loramix.server.ollama.bodies import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    Generated,
    ShowBody,
)
from loramix.server.openai.replies import score_list
from loramix.server.queued_request import QueuedRequest
from loramix.server.service import (
    CollectedAnswer,
    Events,
    Service,
    cancel_on_exit,
    report,
    truncate_vectors,
    until_disconnect,
)

Form = Callable[[str], dict[str, Any]]
NS = 1_000_000_000
OLLAMA_VERSION = "0.13.0"
"""Ollama version whose API is implemented; some clients refuse older versions."""


def router(service: Service) -> APIRouter:
    """Build the router of the endpoints."""
    api = APIRouter(prefix="/api")

    async def answer(
        request: Request, body: Generated, messages: list[dict[str, str]], form: Form
    ) -> Response:
        settings = body.options
        options = service.options(
            body.model,
            body.loramix,
            max_tokens=limit_of(settings.num_predict, service.n_ctx),
            stop=settings.stop or (),
            top_logprobs=body.top_logprobs if body.logprobs else None,
            json_schema=body.schema_for_grammar(),
            **sampling_of(settings),
        )
        if not messages:  # Ollama's clients load a model this way
            return JSONResponse({**_head(body.model), **form(""), "done": True, "done_reason": "load"})
        message = m.Answer(number=0, messages=messages, options=options, buffered=not body.stream)
        jobs = service.submit([message])
        if body.stream:
            try:
                events = await until_disconnect(request, service.begin(jobs[0]))
            except BaseException:
                service.supervisor.cancel(jobs[0])
                raise
            lines = _lines(service, jobs[0], events, body.model, form)
            return StreamingResponse(lines, media_type="application/x-ndjson")
        async with cancel_on_exit(service, jobs):
            collected = await until_disconnect(request, service.collect(jobs[0]))
        return JSONResponse(
            {
                **_head(body.model),
                **form(collected.text),
                **_scores(collected.scores),
                **_tail(collected, jobs[0]),
            }
        )

    @api.post("/chat")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await answer(
            request,
            body,
            engine_messages(body.messages),
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
        """Embed texts."""
        service.target(body.model)
        began = time.perf_counter()
        message = m.Embed(number=0, texts=body.input, truncate=body.truncate)
        result = await until_disconnect(request, service.result(message))
        return JSONResponse(
            {
                "model": body.model,
                "embeddings": truncate_vectors(result.value, body.dimensions),
                "total_duration": int((time.perf_counter() - began) * NS),
                "load_duration": 0,
                "prompt_eval_count": result.tokens,
            }
        )

    @api.post("/embeddings")
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """Embed one text, for older clients."""
        service.target(body.model)
        message = m.Embed(number=0, texts=[body.prompt], truncate=True)
        return JSONResponse(
            {"embedding": (await until_disconnect(request, service.result(message))).value[0]}
        )

    @api.get("/tags")
    async def tags() -> dict[str, Any]:
        """List the models."""
        return {"models": [model(name) for name in service.models]}

    @api.get("/ps")
    async def ps() -> dict[str, Any]:
        """List the loaded models; the pack stays loaded."""
        extra = {"size_vram": 0, "expires_at": "9999-12-31T23:59:59Z", "context_length": service.n_ctx}
        return {"models": [{**model(service.pack.name), **extra}] if service.supervisor.ready else []}

    @api.post("/show")
    async def show(body: ShowBody) -> dict[str, Any]:
        """Show a model's details."""
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
        """Return the implemented Ollama version and the version of Loramix."""
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
    service: Service, job: QueuedRequest, events: Events, model: str, form: Form
) -> AsyncIterator[bytes]:
    """Write an answer as JSON lines; the last one has ``done`` or is an error."""
    collected = CollectedAnswer()
    try:
        async for event in events:
            collected.add(event)
            if isinstance(event, m.Piece) and event.text:
                yield _line({**_head(model), **form(event.text), **_scores(event.scores), "done": False})
        yield _line({**_head(model), **form(""), **_tail(collected, job)})
    except LoramixError as error:
        yield _line({"error": str(error), "done": True})
    finally:
        service.supervisor.cancel(job)


def _head(model: str) -> dict[str, Any]:
    return {"model": model, "created_at": datetime.now(UTC).isoformat()}


def _scores(scores: Sequence[ScoredToken]) -> dict[str, Any]:
    return {"logprobs": score_list(scores)} if scores else {}


def _tail(collected: CollectedAnswer, job: QueuedRequest) -> dict[str, Any]:
    """Return the last fields of an answer: token counts, durations in nanoseconds, and the route."""
    assert collected.ended is not None
    usage, timings = collected.ended.usage, collected.ended.timings
    first = timings["first_token"]
    return {
        "done": True,
        "done_reason": collected.ended.finish_reason,
        "total_duration": int((timings["total"] + job.waited) * NS),
        "load_duration": int(job.waited * NS),
        "prompt_eval_count": usage["prompt_tokens"],
        "prompt_eval_duration": int(first * NS),
        "eval_count": usage["completion_tokens"],
        "eval_duration": int((timings["total"] - first) * NS),
        "loramix": report(collected, job.waited),
    }


def _line(content: dict[str, Any]) -> bytes:
    return msgspec.json.encode(content) + b"\n"


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
