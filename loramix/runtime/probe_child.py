"""The child of `loramix.runtime.probe`: ``python -m loramix.runtime.probe_child BASE 0|1`` loads a base and decodes.

Its exit code says how that went; a crash takes nobody with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loramix.errors import LoramixError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

REFUSED = 3  # the child's exit code for an error of ours, whose sentence is on stderr
WRONG = 4  # and for logits that cannot be right


def agree(together: npt.NDArray[np.float32], apart: npt.NDArray[np.float32]) -> bool:
    """Whether two rows of logits are the same but for rounding: correlation over 0.99.

    Args:
        together: logits after a batch, (V,) float32.
        apart: logits after the same tokens one by one, (V,) float32.
    """
    x, y = together - together.mean(dtype="f8"), apart - apart.mean(dtype="f8")
    return bool(x @ y >= 0.99 * float((x @ x) * (y @ y)) ** 0.5)


def main(arguments: Sequence[str]) -> int:
    """Load a base, decode a batch as the runtime does, and check the logits."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an expected crash leaves no core file
    except (ImportError, OSError, ValueError):
        pass  # Windows, or not allowed here
    from loramix.runtime.llama.context import Context
    from loramix.runtime.llama.model import Model

    try:
        with Model(Path(arguments[0]), use_extra_bufts=arguments[1] == "1") as model:
            tokens = [token % model.n_vocab for token in range(1, 9)]
            # one thread: two take half a minute where another program holds a core
            context = Context(model, n_ctx=64, n_threads=1)
            together = context.decode(tokens)  # raises if not finite
            # one token at a time takes other kernels: a batch that is silently wrong differs
            context.truncate(0)
            apart = [context.decode([token]) for token in tokens][-1]
            if not agree(together, apart):
                print("other logits for a batch than for single tokens", file=sys.stderr)
                return WRONG
    except LoramixError as error:
        print(error, file=sys.stderr)
        return REFUSED
    print('{"ok": true}')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
