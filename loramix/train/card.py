"""The model card of a skill in Markdown: data, licence, adapter shape, results and training command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loramix.train.recipe import Recipe

_SHORT = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def write_card(recipe: Recipe, base: str, run: Mapping[str, Any]) -> str:
    """Write a skill's card.

    Args:
        recipe: recipe of the skill.
        base: name of the base.
        run: ``rows`` (number of training rows), ``dev_loss`` and ``dev_exact`` of the saved adapter.

    Returns:
        Markdown.
    """
    shape, training = recipe.lora, recipe.training
    targets = ", ".join(_SHORT.get(name, name) for name in shape.target_modules)
    layers = f"the upper {1 - shape.skip_lowest:.0%} of layers" if shape.skip_lowest else "every layer"
    phrasings = len({text for group in recipe.instructions.values() for text in group})
    epochs = f"{training.epochs:g} epochs"
    if (rounds := len(training.parts)) > 1:
        epochs += f" in {rounds} rounds"
        if len(set(training.parts)) > 1:
            epochs += f" ({' to '.join(map(str, training.parts))})"
    kept = f" whose answers are perfect by {recipe.keep}" if recipe.keep else ""
    name, data = (f"broad/{recipe.name}", "DIRECTORY") if recipe.data.sources else (recipe.name, "FILE")
    lines = [
        f"# Skill: {recipe.name}",
        "",
        recipe.description,
        "",
        f"- **Base**: {base}, frozen.",
        f"- **Adapter**: LoRA on {targets} of {layers}; r = {shape.r}, lora_alpha = {shape.lora_alpha:g}"
        + (", rank-stabilized." if shape.use_rslora else "."),
        f"- **Data**: {_data(recipe)}",
        f"- **Licence of the data**: {recipe.data.license}.",
        f"- **Trained on** {run['rows']} rows{kept}, {epochs}, in {phrasings} phrasings of the "
        f"instruction, learning rate {training.learning_rate:g}, batches of {training.batch_size}.",
        f"- **Dev**: loss {run['dev_loss']:.3f} nats per token; {run['dev_exact']:.1%} of answers exact "
        "with teacher forcing.",
        f"- **Measured by** {', '.join(recipe.metrics)}; `loramix eval` computes them on test rows.",
        f"- **Made by** `loramix train skill {name} --data {data}`, then `loramix convert adapter`; "
        "`loramix train pack` does both.",
        "- **Limits**: English instructions; a small model imitates the style of its data and may "
        "state what is false.",
    ]
    if recipe.labels:
        lines.insert(3, f"\nAnswers: {', '.join(f'`{label}`' for label in recipe.labels)}.")
    return "\n".join(lines) + "\n"


def _data(recipe: Recipe) -> str:
    """Where the rows come from: a recipe over several sources names each."""
    if not recipe.data.sources:
        return recipe.data.how + (f" (on the hub: `{recipe.data.hub}`)" if recipe.data.hub else "")
    named = []
    for source in recipe.data.sources:
        what = "rows made by rule" if source.made else f"`{source.file}`"
        if source.take:
            what += f" ({', '.join(source.take)})"
        if source.target is not None:
            what += f", all `{source.target}`"
        named.append(what)
    return "; ".join(dict.fromkeys(named)) + f": {recipe.data.rows} rows sampled by weight."
