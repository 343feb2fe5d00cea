"""The directory of a cluster batch's output: one file per finished chunk, each whole or not there at all.

Names that begin with ``_`` or ``.`` are not of the output; readers of such directories leave them out.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from loramix.cluster.chunks import file_system
from loramix.paths import write_bytes

TEMPORARY = "_tmp-"
NOTE = "_begun-"
"""Beginning of the names of notes on work that has begun."""


class OutputFiles:
    """Files of a directory on any file system that pyarrow knows.

    Args:
        place: path or URI of the directory.
    """

    def __init__(self, place: str) -> None:
        self._system, self._path = file_system(place)

    def create(self) -> bool:
        """Create the directory; return whether it is a directory now."""
        from pyarrow import fs

        if self._system.get_file_info(self._path).type == fs.FileType.File:
            return False
        self._system.create_dir(self._path, recursive=True)
        return True

    def names(self) -> set[str]:
        """Return the names of the output's files."""
        return {name for name in self._all() if not name.startswith(("_", "."))}

    def tidy(self) -> None:
        """Remove what killed processes left."""
        for name in self._all():
            if name.startswith((TEMPORARY, NOTE, ".")):
                self.remove(name)

    def _all(self) -> list[str]:
        from pyarrow import fs

        return [info.base_name for info in self._system.get_file_info(fs.FileSelector(self._path))]

    def read_json(self, name: str) -> Any:
        """Return a file's JSON; None if there is no such file."""
        try:
            with self._system.open_input_stream(f"{self._path}/{name}") as stream:
                return json.loads(stream.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically."""
        from pyarrow import fs

        if isinstance(self._system, fs.LocalFileSystem):
            write_bytes(Path(self._path, name), content)
            return
        temporary = f"{self._path}/{TEMPORARY}{secrets.token_hex(8)}"
        with self._system.open_output_stream(temporary) as stream:
            stream.write(content)
        self._system.move(temporary, f"{self._path}/{name}")

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        try:
            self._system.delete_file(f"{self._path}/{name}")
        except FileNotFoundError:
            pass
