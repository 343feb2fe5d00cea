"""``/v1/explain``: an answer with the contribution of each skill to each token, by layer."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from loramix.server import protocol as m
from loramix.server.body_types import Model
from loramix.server.chat_messages import Messages, engine_messages
from loramix.server.fields import Body, must_be
from loramix.server.service import LoramixField, Service, cancel_on_exit, report, until_disconnect

EXPLAINED_TOKENS = 512
"""Longest answer that is measured; each token yields one number per skill and layer."""


class ExplainBody(Body):
    """Body of ``/v1/explain``; the answer is greedy, so it matches a greedy chat answer."""

    model: Model
    messages: Messages
    max_tokens: (
        Annotated[int, must_be(f"a whole number from 1 to {EXPLAINED_TOKENS}", ge=1, le=EXPLAINED_TOKENS)]
        | None
    ) = None
    loramix: LoramixField = None


def router(service: Service) -> APIRouter:
    """Build the router of the endpoint."""
    api = APIRouter(prefix="/v1")

    @api.post("/explain")
    async def explain(body: ExplainBody, request: Request) -> Response:
        """Answer a conversation and measure the contribution of each skill."""
        message = m.Answer(
            number=0,
            messages=engine_messages(body.messages),
            options=service.options(body.model, body.loramix, max_tokens=body.max_tokens),
            buffered=True,
            explain=True,
        )
        (job,) = jobs = service.submit([message])
        async with cancel_on_exit(service, jobs):
            answer = await until_disconnect(request, service.collect(job))
        ended = answer.ended
        assert ended is not None
        content = {
            "object": "explanation",
            "model": body.model,
            "text": answer.text,
            "finish_reason": ended.finish_reason,
            "usage": ended.usage,
            "contributions": ended.contributions,
            "loramix": report(answer, job.waited),
        }
        return JSONResponse(content)

    return api
