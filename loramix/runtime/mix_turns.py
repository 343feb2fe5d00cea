"""Which mix decodes next, where answers of several share a context: adapters belong to the call, so one at a time."""

from __future__ import annotations

from collections.abc import Mapping

from loramix.models.mixing import Mix

SLICE = 16
"""Tokens that a mix decodes in a row while others wait: a change of adapters costs about one token's time."""
MAX_WAIT = 100
"""Tokens that a mix waits at most, some turns' rest aside, while others are shared by more answers."""


class Turns:
    """A mix keeps its turn for `SLICE` tokens; then comes the one that most answers share.

    Eight answers of one mix cost little more than three times one of them, so whole groups first is the most
    tokens a second, and the earlier end for most; a mix that few share goes first once it has waited long.
    """

    def __init__(self) -> None:
        self._clock = 0  # tokens decoded in all
        self._last_token: dict[Mix, int] = {}  # when each mix had its last token
        self._in_turn = 0  # tokens of the present turn

    def next(self, sizes: Mapping[Mix, int], present: Mix | None) -> Mix:
        """The mix that decodes the next token.

        Args:
            sizes: answers that wait for one, by mix; at least one.
            present: the mix that decoded the last one.
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
