"""What the gate reads of a conversation: its last turns, long messages cut in their middle.

Training and run time use this one rule, so that a decision costs the same after two turns as after twenty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FIRST_TOKENS, LAST_TOKENS = 112, 80
"""Tokens of the rendered window that are read: so many from its start and so many from its end."""
READ_TOKENS = FIRST_TOKENS + LAST_TOKENS
USER_TURNS = 3
MAX_CHARACTERS = 640
"""Of a window with earlier turns; above it, the oldest turn is left out."""
GAP = " … "
LAST, BEFORE, OLDEST, ANSWER = (200, 160), (90, 70), (60, 50), (30, 20)
"""Characters kept of a message's beginning and end."""


def limits(roles: Sequence[str], lengths: Sequence[int]) -> list[tuple[int, tuple[int, int] | None]]:
    """Which messages are read, and how much of each.

    Args:
        roles: of the messages, oldest first; the last one is the user's.
        lengths: of the messages in characters.

    Returns:
        (index, (characters of the beginning, of the end)) of each message that is read, oldest first; None: all of it.
        System messages are never read.
    """
    users = [i for i, role in enumerate(roles) if role == "user"][-USER_TURNS:]
    if len(users) == 1:
        return [(users[0], None)]
    while True:
        kept: list[tuple[int, tuple[int, int] | None]] = []
        for i in range(users[0], len(roles)):
            if roles[i] == "user":
                age = len(users) - 1 - users.index(i)
                kept.append((i, (LAST, BEFORE, OLDEST)[min(age, 2)]))
            elif roles[i] == "assistant":
                kept.append((i, ANSWER))
        total = sum(min(lengths[i], sum(limit or ())) for i, limit in kept)
        if total <= MAX_CHARACTERS or len(users) == 2:
            return kept
        users = users[1:]


def is_cut(length: int, limit: tuple[int, int] | None) -> bool:
    """Whether a message of ``length`` characters loses its middle."""
    return limit is not None and length > sum(limit) + len(GAP)


def window(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages that the gate reads.

    Args:
        messages: checked messages with ``role`` and ``content``, the last one the user's.

    Returns:
        At most three user turns with the answers between them.
    """
    roles = [message["role"] for message in messages]
    found = []
    for i, limit in limits(roles, [len(message["content"]) for message in messages]):
        text = messages[i]["content"]
        if limit is not None and is_cut(len(text), limit):
            text = text[: limit[0]] + GAP + text[-limit[1] :]
        found.append({"role": roles[i], "content": text})
    return found


def original_span(span: tuple[int, int], n_read: int, length: int) -> tuple[int, int] | None:
    """Where a part of the last message as it is read lies in the whole message.

    Args:
        span: characters of the message that `window` returns.
        n_read: characters of that message.
        length: characters of the whole message.

    Returns:
        The span; None for what stands for the middle.
    """
    if n_read == length:
        return span
    behind = LAST[0] + len(GAP)
    if span[0] < LAST[0]:
        return span[0], min(span[1], LAST[0])
    if span[1] <= behind:
        return None
    return max(span[0], behind) + length - n_read, span[1] + length - n_read


def cut_tokens(ids: Sequence[int], first: int = FIRST_TOKENS, last: int = LAST_TOKENS) -> list[int]:
    """The tokens that the base reads for the gate; they get contiguous positions from 0 on.

    Args:
        ids: of the whole rendered window.
        first: tokens read from the start.
        last: tokens read from the end.

    Returns:
        All ids if they are at most ``first + last``, else the first and the last ones.
    """
    return list(ids) if len(ids) <= first + last else [*ids[:first], *ids[len(ids) - last :]]
