"""The OpenAI client against ``loramix serve``: a streamed answer, with the mix that gave it.

pip install openai
python examples/openai_client.py [URL [PROMPT]]
"""

from __future__ import annotations

import sys

from openai import OpenAI

PROMPT = "Is this review positive or negative? A dull, endless film."


def main(url: str = "http://127.0.0.1:11435", prompt: str = PROMPT) -> None:
    """Ask the pack that the server has.

    Args:
        url: of the server.
        prompt: the user's message.
    """
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        pack, *named = [model.id for model in client.models.list()]
        print("routed by the gate:", pack)
        print("a skill, or the bare base:", ", ".join(named))
        with client.chat.completions.create(
            model=pack, messages=[{"role": "user", "content": prompt}], stream=True
        ) as chunks:
            for chunk in chunks:
                route = (chunk.model_extra or {}).get("loramix")
                if route and not (chunk.choices and chunk.choices[0].finish_reason):
                    print("mix:", route["mix"] or "base", "because", route["reason"])
                for choice in chunk.choices:
                    print(choice.delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
