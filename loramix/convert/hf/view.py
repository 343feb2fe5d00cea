"""A view of a Hugging Face directory without byte-order marks and without wrappers in tensor names.

gguf and transformers open the files themselves. If a file has a byte-order mark, they get a temporary directory of
links with that file rewritten.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramix.convert.wrappers import unwrapped
from loramix.errors import InvalidArtifact
from loramix.formats.safetensors_reader import SafetensorsFile
from loramix.formats.textfile import is_plain_utf8, read_text

_TEXTS = (".json", ".jinja", ".txt")


@contextmanager
def plain_directory(directory: Path) -> Iterator[Path]:
    """Yield the directory, or a temporary directory of links if a text file has a byte-order mark.

    Args:
        directory: a checkpoint.

    Raises:
        InvalidArtifact: a text file is not valid text.
    """
    texts = [path for path in directory.iterdir() if path.suffix in _TEXTS and path.is_file()]
    marked = [path for path in texts if not is_plain_utf8(path)]
    if not marked:
        yield directory
        return
    with tempfile.TemporaryDirectory() as temporary:
        for path in directory.iterdir():
            copy = Path(temporary) / path.name
            if path in marked:
                copy.write_text(read_text(path, InvalidArtifact), encoding="utf-8")
            else:
                copy.symlink_to(path.resolve())
        yield Path(temporary)


def key_mapping(directory: Path) -> dict[str, str]:
    """Return the ``key_mapping`` for transformers that removes wrappers from tensor names; empty without wrappers.

    Args:
        directory: a checkpoint.

    Returns:
        Names without wrappers by patterns of full names, because transformers replaces only once in a name.

    Raises:
        InvalidArtifact: a file is damaged.
    """
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with SafetensorsFile(path) as file:
            found |= {
                f"^{re.escape(name)}$": unwrapped(name) for name in file.entries if unwrapped(name) != name
            }
    return found
