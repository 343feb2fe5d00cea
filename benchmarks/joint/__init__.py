"""Trains many LoRA adapters of one frozen GGUF base together on a GPU; see README.md.

All modules but ``prepare`` and ``export`` need only PyTorch, NumPy, gguf and click, not Loramix.
"""

import click


class JointError(click.ClickException):
    """A file or a setting that cannot be used; the message says what is needed."""
