"""``/v1/explain``: an answer with what each skill of its mix added to each token, layer by layer."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from loramix.server import protocol as m
from loramix.server.body_types import Model
from loramix.server.chat_messages import Messages, plain
from loramix.server.fields import Body, says
from loramix.server.service import Options, Service, giving_up, report, unless_left

EXPLAINED_TOKENS = 512
"""Of an answer that is measured: each token gives a number per skill and layer."""


class ExplainBody(Body):
    """Body of ``/v1/explain``; the answer is greedy, so that it is the chat's where that was."""

    model: Model
    messages: Messages
    max_tokens: (
        Annotated[int, says(f"a whole number from 1 to {EXPLAINED_TOKENS}", ge=1, le=EXPLAINED_TOKENS)] | None
    ) = None
    loramix: Annotated[Options | None, says("an object with policy or mix")] = None


def router(service: Service) -> APIRouter:
    """The endpoint, on a service."""
    api = APIRouter(prefix="/v1")

    @api.post("/explain")
    async def explain(body: ExplainBody, request: Request) -> Response:
        """Answer a conversation, and measure what each skill added."""
        asked = m.Answer(
            number=0,
            messages=plain(body.messages),
            options=service.options(body.model, body.loramix, max_tokens=body.max_tokens),
            whole=True,
            explain=True,
        )
        (job,) = jobs = service.submit([asked])
        async with giving_up(service, jobs):
            answer = await unless_left(request, service.whole(job))
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
