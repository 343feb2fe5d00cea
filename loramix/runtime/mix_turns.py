"""Selects the mix that decodes next in the batch context, where adapters apply to a whole call."""

from __future__ import annotations

from collections.abc import Mapping

from loramix.models.mixing import Mix

SLICE = 16
"""Tokens that a mix decodes in a row while others wait; a change of adapters costs about one token's time."""
MAX_WAIT = 100
"""Maximum tokens that a mix waits, apart from the rest of the current turn."""


class Turns:
    """A mix keeps its turn for `SLICE` tokens; the next turn goes to the mix of most answers.

    Eight answers of one mix cost about three times as much as one, so serving the largest group first maximizes
    throughput. A smaller group goes first after it has waited `MAX_WAIT` tokens.
    """

    def __init__(self) -> None:
        self._clock = 0  # tokens decoded in all
        self._last_token: dict[Mix, int] = {}  # clock value of each mix's last token
        self._in_turn = 0  # tokens of the current turn

    def next(self, sizes: Mapping[Mix, int], present: Mix | None) -> Mix:
        """Return the mix that decodes the next token.

        Args:
            sizes: number of waiting answers by mix; not empty.
            present: the mix that decoded the last token.
        """
        if present is None or present not in sizes or (self._in_turn >= SLICE and len(sizes) > 1):
            present = self._choose(sizes, present)
            self._in_turn = 0
        self._in_turn += 1
        self._clock += 1
        self._last_token[present] = self._clock
        return present

    def _choose(self, sizes: Mapping[Mix, int], last: Mix | None) -> Mix:
        last_token = self._last_token = {mix: self._last_token.get(mix, self._clock) for mix in sizes}
        longest = min(sizes, key=lambda mix: (last_token[mix], str(mix)))
        if self._clock - last_token[longest] > MAX_WAIT:
            return longest
        others = [mix for mix in sizes if mix != last] or list(sizes)
        return max(others, key=lambda mix: (sizes[mix], -last_token[mix], str(mix)))
