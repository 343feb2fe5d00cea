"""Options and inputs shared by several commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramix.commands.fetch_base import fetch_base_of
from loramix.commands.terminal import need_cwd
from loramix.defaults import DEFAULT_PACK, DEFAULT_POLICY, MIN_CTX, N_CTX, POLICIES
from loramix.errors import MissingExtra

if TYPE_CHECKING:
    from loramix.runtime.answer import Answer
    from loramix.runtime.engine import Engine

PATH = click.Path(path_type=Path)
PACK = click.option("--pack", "-p", default=DEFAULT_PACK, show_default=True, help="Pack: name or directory.")
THREADS = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads; by default one per physical core that the process may use.",
)
CTX = click.option(
    "--ctx",
    type=click.IntRange(MIN_CTX),
    default=N_CTX,
    show_default=True,
    help="Tokens of the context: prompt and answer together.",
)
POLICY = click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default=DEFAULT_POLICY,
    show_default=True,
    help="How the gate's probabilities become an answer (see the README).",
)


def engine_options(command: Any) -> Any:
    """Add the options of commands that open a pack."""
    for option in (THREADS, CTX, PACK):
        command = option(command)
    return command


def answer_options(command: Any) -> Any:
    """Add the options of commands that generate answers."""
    for option in (
        click.option(
            "--labels/--no-labels",
            default=True,
            help="Restrict a skill that classifies to its labels.",
            show_default=True,
        ),
        click.option("--stop", multiple=True, help="Text that ends the answer; repeatable."),
        click.option("--seed", type=click.IntRange(0), help="Random seed; by default a new one."),
        click.option("--repeat-penalty", type=float, default=1.0, show_default=True, help="1 is off."),
        click.option("--min-p", type=float, default=0.0, show_default=True, help="0 is off."),
        click.option("--top-k", type=int, default=0, show_default=True, help="0 is off."),
        click.option("--top-p", type=float, default=1.0, show_default=True, help="1 is off."),
        click.option("--temperature", "-t", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option(
            "--max-tokens",
            "-n",
            type=click.IntRange(1),
            help="Maximum tokens of the answer; by default the skill's.",
        ),
        click.option(
            "--mix", "-m", help="Fixed mix instead of the gate: 'sentiment=0.7,summarize=0.3', or 'base'."
        ),
        POLICY,
    ):
        command = option(command)
    return command


def open_engine(pack: str, ctx: int, threads: int | None) -> Engine:
    """Open the engine of a pack; on a terminal, offer to fetch a missing base."""
    fetch_base_of(pack)
    from loramix.runtime.engine import Engine

    return Engine.open(pack, n_ctx=ctx, n_threads=threads)


def read_prompt(prompt: tuple[str, ...]) -> str:
    """Join the prompt's words; read stdin if the prompt is ``-`` or absent.

    Raises:
        UsageError: stdin is closed or is not text.
    """
    from loramix.commands.terminal import read_stdin

    return " ".join(prompt) if prompt and prompt != ("-",) else read_stdin()


def answer_json(answer: Answer) -> dict[str, Any]:
    """Convert an answer to a JSON object, with its parts, the labels, and the mix of each token if it changed."""
    from loramix.runtime.steps import answer_fields

    mixes = {"mixes": [mix.to_json() for mix in answer.mixes]} if len(set(answer.mixes)) > 1 else {}
    return {
        "text": answer.text,
        "route": answer.route.to_json(),
        **answer_fields(answer.parts, answer.step_labels),
        **mixes,
        "usage": answer.usage,
        "timings": {name: round(seconds, 4) for name, seconds in answer.timings.items()},
        "finish_reason": answer.finish_reason,
    }


@contextmanager
def training_extra() -> Iterator[None]:
    """Turn a missing training dependency into an error with the command that installs it."""
    need_cwd()
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in {
            "torch",
            "transformers",
            "peft",
            "safetensors",
            "rouge_score",
            "sacrebleu",
            "matplotlib",
            "sklearn",
        }:
            raise MissingExtra(f"training needs {error.name}: pip install 'loramix[train]'.") from None
        raise
