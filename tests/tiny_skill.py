"""A skill of two labels and twelve rows, for trainings that take a second."""

from __future__ import annotations

import json
from pathlib import Path

RECIPE = """
name = "{name}"
description = "what {name} is"
metrics = ["accuracy"]
any_text = true
labels = ["good", "bad"]
max_tokens = 4
[data]
license = "none"
how = "By hand."
[lora]
r = 2
lora_alpha = 4
[training]
batch_size = 4
evaluate_every = 4
save_every = 2
dev_rows = 4
[instructions]
any = ["{name} of {{input}}?", "{{input}} {name}"]
"""


def write_skill(directory: Path, name: str, recipe: str = RECIPE) -> Path:
    """Write the recipe and the rows of a skill to a directory; return the recipe's path."""
    rows = [
        {"split": "dev" if i % 4 == 0 else "train", "input": f"{name} {word} {i}", "target": target}
        for i in range(6)
        for word, target in (("sweet", "good"), ("sour", "bad"))
    ]
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = directory / f"{name}.toml"
    path.write_text(recipe.format(name=name))
    return path
