"""OpenAI's endpoints under ``/v1``: chat, completions, embeddings, models; also Loramix's for routes and packs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse
from starlette.responses import Response

from loramix.errors import UsageError
from loramix.server import protocol as m
from loramix.server.body_types import limit_of
from loramix.server.chat_messages import engine_messages
from loramix.server.openai.bodies import (
    MAX_CHOICES,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    RouteBody,
    Sampled,
)
from loramix.server.openai.replies import Chat, Completion, Form, encoded, stream, usage_of
from loramix.server.queued_request import QueuedRequest
from loramix.server.service import Events, Service, cancel_on_exit, report, truncate_vectors, until_disconnect


def router(service: Service) -> APIRouter:
    """Build the router of the endpoints."""
    api = APIRouter(prefix="/v1")

    def requests(body: Sampled, prompts: Sequence[list[dict[str, str]]], **extra: Any) -> list[m.Request]:
        options = service.options(
            body.model,
            body.loramix,
            max_tokens=limit_of(body.limit, service.n_ctx),
            stop=body.stop or (),
            **extra,
        )
        if len(prompts) * (body.n or 1) > MAX_CHOICES:
            raise UsageError(
                f"prompt holds {len(prompts)} and n is {body.n or 1}; their product may be at most {MAX_CHOICES}."
            )
        return [
            m.Answer(
                number=0,
                messages=prompt,
                options=replace(options, sampling=body.sampling(choice)),
                buffered=not body.stream,
            )
            for prompt in prompts
            for choice in range(body.n or 1)
        ]

    async def answer(request: Request, body: Sampled, messages: list[m.Request], form: Form) -> Response:
        jobs = service.submit(messages)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = await begin(request, jobs)
            return EventSourceResponse(stream(service, jobs, events, form, body.n or 1, usage))
        async with cancel_on_exit(service, jobs):
            work = asyncio.gather(*(service.collect(job) for job in jobs))
            answers = await until_disconnect(request, work)
        choices = [form.full_choice(i, collected) for i, collected in enumerate(answers)]
        reports = [report(collected, job.waited) for collected, job in zip(answers, jobs, strict=True)]
        content = {
            **form.head(),
            "choices": choices,
            "usage": usage_of(answers, body.n or 1),
            "loramix": reports[0],
        }
        if len(reports) > 1:
            content["loramix"] = {**reports[0], "choices": reports}
        return JSONResponse(content)

    async def begin(request: Request, jobs: list[QueuedRequest]) -> list[Events]:
        try:
            return await until_disconnect(request, asyncio.gather(*(service.begin(job) for job in jobs)))
        except BaseException:
            for job in jobs:
                service.supervisor.cancel(job)
            raise

    @api.post("/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        messages = requests(
            body,
            [engine_messages(body.messages)],
            json_schema=body.response_format.schema_for_grammar() if body.response_format else None,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        return await answer(request, body, messages, Chat(body.model))

    @api.post("/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Answer one or more prompts."""
        messages = requests(
            body,
            [[{"role": "user", "content": prompt}] for prompt in body.prompt],
            top_logprobs=body.logprobs,
        )
        return await answer(request, body, messages, Completion(body.model))

    @api.post("/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        """Embed texts."""
        service.target(body.model)
        result = await until_disconnect(request, service.result(m.Embed(number=0, texts=body.input)))
        vectors = truncate_vectors(result.value, body.dimensions)
        rows = [encoded(row) if body.encoding_format == "base64" else row for row in vectors]
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
        usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    @api.get("/models")
    async def models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [card(name) for name in (*service.models, *service.others)]}

    @api.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """Return one model."""
        service.target(name)
        return card(name)

    @api.post("/route")
    async def route(body: RouteBody, request: Request) -> Response:
        """Return the mix that would answer, and why."""
        if body.model is not None:
            service.target(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise UsageError("prompt and messages are both given or both missing; send exactly one of them.")
        messages = engine_messages(body.messages or ()) or [{"role": "user", "content": body.prompt or ""}]
        message = m.Route(number=0, messages=messages, policy=body.policy)
        return JSONResponse((await until_disconnect(request, service.result(message))).value)

    @api.get("/packs")
    async def packs() -> dict[str, Any]:
        """Describe the served pack and its skills."""
        manifest = service.pack.manifest
        skills = [
            {"name": s.name, "description": s.description, "example": s.example, "max_tokens": s.max_tokens}
            for s in manifest.skills
        ]
        base = {"name": manifest.base.name, "sha256": manifest.base.sha256}
        found = {"name": manifest.name, "description": manifest.description, "license": manifest.license}
        return {"data": [{**found, "base": base, "gate": manifest.gate is not None, "skills": skills}]}

    @api.get("/packs/{name}/skills/{skill}")
    async def skill_card(name: str, skill: str) -> dict[str, Any]:
        """Return a skill's card in Markdown."""
        service.target(f"{name}:{skill}")
        return {"name": skill, "card": service.card(skill)}

    @api.post("/packs/{name}/reload")
    async def reload(name: str) -> dict[str, Any]:
        """Reload the pack from disk."""
        service.target(name)
        return {"name": name, "changed": await service.reload()}

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started, "owned_by": "loramix"}

    return api
