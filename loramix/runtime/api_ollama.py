"""Ollama's endpoints under ``/api``: chat, generate, embed, tags, show, ps, version; streams are lines of JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response, StreamingResponse

import loramix
from loramix.errors import LoramixError, UsageError
from loramix.runtime import messages as m
from loramix.runtime.job import Job
from loramix.runtime.ollama_bodies import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    Generated,
    ShowBody,
)
from loramix.runtime.service import Events, Service, Whole, giving_up, report, unless_left

Form = Callable[[str], dict[str, Any]]
NS = 1_000_000_000


def router(service: Service) -> APIRouter:
    """The endpoints, on a service."""
    api = APIRouter(prefix="/api")

    async def answer(
        request: Request, body: Generated, messages: list[dict[str, str]], form: Form
    ) -> Response:
        policy, mix = service.target(body.model, body.loramix)
        if not messages:  # how Ollama's clients load a model
            return JSONResponse({**_head(body.model), **form(""), "done": True, "done_reason": "load"})
        asked = m.Answer(
            number=0,
            messages=messages,
            policy=policy,
            mix=mix,
            max_tokens=body.options.max_tokens(service.n_ctx),
            stop=body.options.stops,
            sampling=body.options.sampling(),
            json_schema=body.schema_for_grammar(),
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
        return JSONResponse({**_head(body.model), **form(whole.text), **_tail(whole, jobs[0])})

    @api.post("/chat")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        messages = [{"role": message.role, "content": message.content} for message in body.messages]
        return await answer(
            request, body, messages, lambda text: {"message": {"role": "assistant", "content": text}}
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
        texts = [body.input] if isinstance(body.input, str) else body.input
        result = await unless_left(request, service.result(m.Embed(number=0, texts=texts)))
        return JSONResponse(
            {"model": body.model, "embeddings": result.value, "prompt_eval_count": result.tokens}
        )

    @api.post("/embeddings")
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """Vector of one text, as older clients ask for it."""
        service.target(body.model)
        asked = m.Embed(number=0, texts=[body.prompt])
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
            raise UsageError("give a model.")
        service.target(name)
        _, _, part = name.partition(":")
        known = {skill.name: skill for skill in service.pack.skills}
        return {
            "license": service.pack.manifest.license,
            "modelfile": f"# {known[part].description if part in known else service.pack.manifest.description}\n",
            "parameters": f"num_predict {known[part].max_tokens}" if part in known else "",
            "template": "",
            "details": details(),
            "model_info": {
                "general.architecture": "llama",
                "general.basename": service.pack.manifest.base.name,
                "llama.context_length": service.n_ctx,
                "loramix.skills": list(known),
            },
            "capabilities": ["completion", "embedding"],
            "modified_at": _time(service.started),
        }

    @api.get("/version")
    async def version() -> dict[str, str]:
        """Ours, in the place of Ollama's."""
        return {"version": loramix.__version__}

    def model(name: str) -> dict[str, Any]:
        return {
            "name": name,
            "model": name,
            "modified_at": _time(service.started),
            "size": service.size,
            "digest": service.pack.manifest.base.sha256,
            "details": details(),
        }

    def details() -> dict[str, Any]:
        return {
            "parent_model": service.pack.manifest.base.name,
            "format": "gguf",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": "",
            "quantization_level": "",
        }

    return api


async def _lines(service: Service, job: Job, begun: Events, model: str, form: Form) -> AsyncIterator[bytes]:
    """Lines of an answer; the last one has ``done``, or is an error."""
    whole = Whole()
    try:
        async for event in begun:
            whole.add(event)
            if isinstance(event, m.Said) and event.text:
                yield _line({**_head(model), **form(event.text), "done": False})
        yield _line({**_head(model), **form(""), **_tail(whole, job)})
    except LoramixError as error:
        yield _line({"error": str(error), "done": True})
    finally:
        service.supervisor.leave(job)


def _head(model: str) -> dict[str, Any]:
    return {"model": model, "created_at": datetime.now(UTC).isoformat()}


def _tail(whole: Whole, job: Job) -> dict[str, Any]:
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
