"""A terminal chat: each turn is routed, and the mix that answers is shown.

python examples/chat.py [PACK]
"""

from __future__ import annotations

import sys

from loramix import DEFAULT, Engine, LoramixError


def main(pack: str = DEFAULT) -> None:
    """Read a message per line until the end of stdin.

    Args:
        pack: name or directory.
    """
    messages: list[dict[str, str]] = []
    with Engine.open(pack) as engine:
        for line in sys.stdin:
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line.strip()})
            stream = engine.stream(messages, max_tokens=128)
            print(f"[{stream.route.named}] ", end="")
            for piece in stream:
                print(piece, end="", flush=True)
            print()
            if stream.answer is not None:
                messages.append({"role": "assistant", "content": stream.answer.text})


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except LoramixError as error:
        sys.exit(f"error: {error}")
