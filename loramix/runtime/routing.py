"""Routes a prepared prompt: computes its features with the base and runs the gate."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from loramix.errors import Unsupported
from loramix.models.mixing import Mix
from loramix.pack.pack import Pack
from loramix.runtime.decoder import Decoder, DecodeRequest
from loramix.runtime.features import pool
from loramix.runtime.options import GenerationOptions
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.router import Route, Router
from loramix.runtime.token_mixer import TOKEN_CONTEXTS


def routing_request(
    router: Router, prompt: PreparedPrompt, options: GenerationOptions
) -> DecodeRequest | None:
    """Return the base-model prefill that routing needs, so that it can be chunked; None if it needs none.

    Args:
        router: the pack's router.
        prompt: the tokenized prompt.
        options: only ``policy`` and ``mix`` are used.
    """
    if options.mix is not None or options.policy == "base" or router.gate is None:
        return None
    return DecodeRequest(Mix.EMPTY, prompt.routed, len(prompt.routed))


def route_prompt(
    pack: Pack, router: Router, decoder: Decoder, prompt: PreparedPrompt, options: GenerationOptions
) -> Route:
    """Choose the mix for a prompt.

    Args:
        pack: the pack, whose skills a mix may name.
        router: the pack's router.
        decoder: decodes the prompt under the bare base.
        prompt: the tokenized prompt.
        options: only ``policy`` and ``mix`` are used.

    Returns:
        The route, with the seconds for features and gate in ``timings``.

    Raises:
        UnknownSkill: the mix names a skill that the pack lacks.
        Unsupported: policy ``token`` with a gate that reads more than the last token.
    """
    if options.mix is not None:
        for skill in options.mix.scales:
            pack.skill(skill)
        return router.fixed(options.mix)
    gate = router.gate
    if options.policy == "base" or not router.skills:
        return router.fixed(Mix.EMPTY)
    if options.policy == "token" and gate is not None and gate.info.pooling != "last":
        raise Unsupported(
            f"the gate of {pack.name} reads {gate.info.pooling!r}, not the last token alone, which token-wise "
            "routing needs; use another policy."
        )
    began = time.perf_counter()
    features = _features(router, decoder, prompt.routed)
    middle = time.perf_counter()
    route = router.decide(features, options.policy)
    if options.policy == "token" and len(route.mix) > 1:
        decoder.pool.size = max(decoder.pool.size, TOKEN_CONTEXTS)
    return replace(route, timings={"features": middle - began, "gate": time.perf_counter() - middle})


def gate_probabilities(router: Router, decoder: Decoder, mix: Mix) -> dict[str, float]:
    """Return the gate's probabilities by skill at the last token of a mix's context; empty if unsupported.

    Args:
        router: the router, whose gate may have been replaced since the answer began.
        decoder: the decoder that holds the mix's context.
        mix: the mix that decoded the token.
    """
    gate = router.gate
    if gate is None or gate.info.pooling != "last":
        return {}
    states = pool(decoder.pool.get(mix), gate.info.layers, "last")
    return dict(zip(gate.info.skills, map(float, gate.probabilities(states)), strict=False))


def _features(router: Router, decoder: Decoder, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Compute the features of the last user message alone, as in the gate's training."""
    if router.gate is None:
        return np.zeros(0, np.float32)
    context, start, _ = decoder.pool.prepare(Mix.EMPTY, tokens)
    context.decode(tokens[start:])
    return pool(context, router.gate.info.layers, router.gate.info.pooling)
