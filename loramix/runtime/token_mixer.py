"""Token-wise routing: the gate reads the growing answer every few tokens and shifts the mix between two skills.

The three mixes (either skill, or both in equal parts) have one context each. A change of mix decodes the tokens
since its last use in one batch and does not rebuild a graph. X-LoRA (Buehler & Buehler, arXiv 2402.07148) also
changes scales per token, with a head trained for it; here the prompt gate is used, which was not trained on
generated tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from loramix.models.mixing import Mix

LEVELS = 2
TOKEN_CONTEXTS = 4  # one context per level, and that of the bare base
RATE = 0.3
"""Step size of the share towards the gate's probabilities at a token."""
HYSTERESIS = 0.35
"""Distance of the share from the current level at which the mix changes; plain rounding would be 0.25."""


class TokenMixer:
    """Updates the mix of one answer from token to token.

    Args:
        mix: the prompt's blend; only its two strongest skills are used.
    """

    def __init__(self, mix: Mix) -> None:
        (self.first, a), (self.second, b) = sorted(mix.items(), key=lambda item: -item[1])[:2]
        self.share = a / (a + b)
        self.level = _level(self.share)

    @property
    def mix(self) -> Mix:
        """The mix for the next token."""
        return Mix.of({self.first: self.level, self.second: 1 - self.level})

    def follow(self, probabilities: Mapping[str, float], n_tokens: int = 1) -> Mix:
        """Update the mix from the gate's probabilities after the last token.

        Args:
            probabilities: by skill; other skills and the base are ignored. Without the two skills the mix stays.
            n_tokens: tokens since the last reading; the share moves as far as with as many equal readings.

        Returns:
            The mix for the next token.
        """
        a, b = probabilities.get(self.first, 0.0), probabilities.get(self.second, 0.0)
        if a + b > 0:
            left = (1 - RATE * (a + b)) ** n_tokens
            self.share += (1 - left) * (a / (a + b) - self.share)
        if abs(self.share - self.level) > HYSTERESIS:
            self.level = _level(self.share)
        return self.mix


def _level(share: float) -> float:
    return round(share * LEVELS) / LEVELS
