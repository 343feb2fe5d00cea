"""The child of `loramix.runtime.probe`: ``python -m loramix.runtime.probe_child BASE 0|1`` loads a base and decodes.

Reports the result in its exit code; a crash ends only this process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loramix.errors import REFUSED, LoramixError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WRONG = 4  # exit code for wrong logits


def logits_match(batched: npt.NDArray[np.float32], single: npt.NDArray[np.float32]) -> bool:
    """Whether two rows of logits are equal up to rounding: correlation of at least 0.99.

    Args:
        batched: logits after a batch, (V,) float32.
        single: logits after the same tokens decoded one by one, (V,) float32.
    """
    x, y = batched - batched.mean(dtype="f8"), single - single.mean(dtype="f8")
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
            # one thread, because two take half a minute if another program occupies a core
            context = Context(model, n_ctx=64, n_threads=1)
            batched = context.decode(tokens)  # raises if not finite
            # single tokens use other kernels, so a silently wrong batch gives other logits
            context.truncate(0)
            single = [context.decode([token]) for token in tokens][-1]
            if not logits_match(batched, single):
                print("other logits for a batch than for single tokens", file=sys.stderr)
                return WRONG
    except LoramixError as error:
        print(error, file=sys.stderr)
        return REFUSED
    print('{"ok": true}')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
