"""``/v1/explain``: an answer with what each skill of its mix added to each token, layer by layer."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from loramix.runtime import messages as m
from loramix.runtime.openai_bodies import ChatMessage
from loramix.runtime.service import Name, Options, Service, giving_up, report, unless_left

MAX_TOKENS = 512
"""Of an answer that is measured: each token gives a number per skill and layer."""


class ExplainBody(BaseModel):
    """Body of ``/v1/explain``; the answer is greedy, so that it is the chat's where that was."""

    model: Name
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=512)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    loramix: Options | None = None


def router(service: Service) -> APIRouter:
    """The endpoint, on a service."""
    api = APIRouter(prefix="/v1")

    @api.post("/explain")
    async def explain(body: ExplainBody, request: Request) -> Response:
        """Answer a conversation, and measure what each skill added."""
        policy, mix = service.target(body.model, body.loramix)
        asked = m.Answer(
            number=0,
            messages=[message.plain() for message in body.messages],
            policy=policy,
            mix=mix,
            max_tokens=body.max_tokens,
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
