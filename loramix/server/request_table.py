"""The body type of each endpoint, and the table of all request fields."""

from __future__ import annotations

from loramix.server.api_explain import ExplainBody
from loramix.server.fields import Body, Row
from loramix.server.ollama import bodies as ollama
from loramix.server.openai import bodies as openai

BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": openai.ChatBody,
    "/v1/completions": openai.CompletionBody,
    "/v1/embeddings": openai.EmbeddingBody,
    "/v1/route": openai.RouteBody,
    "/v1/explain": ExplainBody,
    "/api/chat": ollama.ChatBody,
    "/api/generate": ollama.GenerateBody,
    "/api/embed": ollama.EmbedBody,
    "/api/embeddings": ollama.EmbeddingsBody,
    "/api/show": ollama.ShowBody,
}
WITHOUT = (
    "/health",
    "/metrics",
    "/api/ps",
    "/api/tags",
    "/api/version",
    "/v1/models",
    "/v1/models/{name}",
    "/v1/packs",
    "/v1/packs/{name}/reload",
    "/v1/packs/{name}/skills/{skill}",
)
"""Endpoints without a body; a body is ignored."""


def table() -> dict[str, dict[str, Row]]:
    """Return the fields of every endpoint's body, by path and field name."""
    return {path: body.table() for path, body in BODIES.items()} | {path: {} for path in WITHOUT}
