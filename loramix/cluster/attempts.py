"""Finds the row that kills a worker: notes in the output which chunk, and later which row, a process has begun.

Ray begins a chunk again whenever its worker dies. After two deaths the rows are answered one by one, and a row at
which the process dies twice becomes an error row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from loramix.cluster.output_files import NOTE, OutputFiles
from loramix.errors import InvalidData, NativeError
from loramix.formats.tables import Row

TOGETHER = 2
"""Attempts at a chunk as a whole."""
PER_ROW = 2
"""Deaths at a row until it is an error."""
IN_VAIN = 10
"""Deaths at a chunk without getting as far as a row."""


class Attempt:
    """One attempt at a chunk.

    Args:
        files: the output.
        chunk: name of the chunk.
    """

    def __init__(self, files: OutputFiles, chunk: str) -> None:
        self._files, self._chunk, self._name = files, chunk, f"{NOTE}{chunk}.json"
        self._state: dict[str, Any] = files.read_json(self._name) or {"begun": 0, "row": None, "deaths": {}}

    def begin(self) -> None:
        """Note that the chunk is begun.

        Raises:
            NativeError: too many processes died at it.
        """
        state = self._state
        if state["row"] is not None:
            key = str(state["row"])
            state["deaths"][key] = state["deaths"].get(key, 0) + 1
            state.update(row=None, begun=TOGETHER)
        elif state["begun"] >= IN_VAIN:
            raise NativeError(
                f"{state['begun']} workers died at {self._chunk} before its first row, perhaps out of memory; what was "
                "answered is kept, and the same command resumes."
            )
        state["begun"] += 1
        self._save()

    def groups(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Yield the rows in groups that are answered together; a row that killed its process is an error."""
        if self._state["begun"] <= TOGETHER:
            yield list(rows)
            return
        for number, row in rows:
            if self._state["deaths"].get(str(number), 0) >= PER_ROW:
                yield [(number, InvalidData(f"the process that answers row {number} dies."))]
                continue
            self._state["row"] = number
            self._save()
            yield [(number, row)]

    def end(self) -> None:
        """Note that the chunk is finished."""
        self._files.remove(self._name)

    def _save(self) -> None:
        self._files.write(self._name, json.dumps(self._state).encode())
