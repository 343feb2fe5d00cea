"""Token-wise routing: the gate reads each token's hidden state and moves the mix between two skills.

Three mixes, the one, the other and both alike, have a context each: a change of mix costs the decoding of the
tokens in between, in one batch, and no rebuilding of a graph. What stands before a token is then the KV of the
mix that decodes it. X-LoRA (Buehler & Buehler, arXiv 2402.07148) moves scales token by token too, by a head
trained for it; here the prompt's gate is asked, which never saw a generated token in training.
"""

from __future__ import annotations

from collections.abc import Mapping

from loramix.models.mixing import Mix

LEVELS = 2
TOKEN_CONTEXTS = 4  # a context for each level, and the bare base's
RATE = 0.3
"""How much of the way to what a token's state says the share goes, where the gate is sure of one of the two."""
HYSTERESIS = 0.35
"""How far the share must be from the level in use before the mix changes; without any it would be 0.25."""


class TokenMixer:
    """Follows one answer's tokens.

    Args:
        mix: the prompt's blend; its two strongest skills take part.
    """

    def __init__(self, mix: Mix) -> None:
        (self.first, a), (self.second, b) = sorted(mix.items(), key=lambda item: -item[1])[:2]
        self.share = a / (a + b)
        self.level = _level(self.share)

    @property
    def mix(self) -> Mix:
        """The mix for the next token."""
        return Mix.of({self.first: self.level, self.second: 1 - self.level})

    def follow(self, probabilities: Mapping[str, float]) -> Mix:
        """Move with what the gate reads in the last token's state.

        Args:
            probabilities: by skill; those of other skills and of the base leave the mix as it is, and so does
                a gate that has lost the two since.

        Returns:
            The mix for the next token.
        """
        a, b = probabilities.get(self.first, 0.0), probabilities.get(self.second, 0.0)
        if a + b > 0:
            self.share += RATE * (a + b) * (a / (a + b) - self.share)
        if abs(self.share - self.level) > HYSTERESIS:
            self.level = _level(self.share)
        return self.mix


def _level(share: float) -> float:
    return round(share * LEVELS) / LEVELS
