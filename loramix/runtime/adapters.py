"""Adapters in native memory, made when a mix asks for them: a skill padded to its fastest rank, a blend fused.

What goes in is a mix; what comes out is at most one adapter with its scale, whatever the mix. The files stay
open, so that a pack that changes on disk takes nothing from an engine that has not reloaded yet.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

from loramix.convert.fuse import fuse
from loramix.errors import InvalidArtifact
from loramix.models.mixing import Mix
from loramix.runtime.llama import Adapter, Model


class AdapterFile:
    """A checked adapter file, held open; its bytes are checked again whenever they are read.

    Args:
        path: the file.
        sha256: of the bytes that were checked.
        invocation: tokens from which on it acts; empty where it acts on all.
    """

    def __init__(self, path: Path, sha256: str, invocation: tuple[int, ...] = ()) -> None:
        self.path, self.sha256, self.invocation = path, sha256, invocation
        self._file = path.open("rb")

    def read(self) -> bytes:
        """The bytes that were checked.

        Raises:
            InvalidArtifact: somebody wrote into the file since.
        """
        self._file.seek(0)
        content = self._file.read()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise InvalidArtifact(
                f"{self.path} has changed since it was checked; run 'loramix pack check', then reload."
            )
        return content

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class AdapterCache:
    """At most ``size`` adapters in native memory, the least recently used freed first, never one in use.

    Args:
        model: the base.
        size: most adapters.
    """

    def __init__(self, model: Model, size: int = 8) -> None:
        self._model, self._size = model, size
        self._files: dict[str, AdapterFile] = {}
        self._loaded: OrderedDict[Mix, Adapter] = OrderedDict()

    def put(self, name: str, file: AdapterFile) -> None:
        """Know a skill; no bytes are loaded."""
        self._files[name] = file

    def get(self, mix: Mix) -> list[tuple[Adapter, float]]:
        """The adapter that acts as a mix does, with its scale; none for the empty mix.

        Args:
            mix: of known skills.
        """
        if not mix:
            return []
        # one skill alone is one adapter at any scale; a blend has its scales folded in
        skills = list(mix.scales)
        key, scale = (mix, 1.0) if len(skills) > 1 else (Mix.of({skills[0]: 1.0}), mix.scales[skills[0]])
        if key not in self._loaded:
            content = fuse([(self._files[name].read(), weight) for name, weight in key.items()])
            self._shrink(self._size - 1)
            self._loaded[key] = self._model.load_adapter(content, str(key))
        self._loaded.move_to_end(key)
        return [(self._loaded[key], scale)]

    def invocation(self, mix: Mix) -> tuple[int, ...]:
        """Tokens from which on a mix acts, where all of its skills do from these same; else empty."""
        found = {self._files[name].invocation for name in mix.scales}
        return found.pop() if len(found) == 1 else ()

    @property
    def mixes(self) -> list[Mix]:
        """What is in native memory, least recently used first."""
        return list(self._loaded)

    def _shrink(self, size: int) -> None:
        for key in list(self._loaded):
            if len(self._loaded) <= size:
                return
            if not self._loaded[key].in_use:
                self._loaded.pop(key).close()

    def drop(self, skills: Collection[str]) -> None:
        """Forget skills, and free what was made of them; no context may use it any more."""
        for key in [key for key in self._loaded if not key.scales.keys().isdisjoint(skills)]:
            self._loaded.pop(key).close()
        for name in skills:
            if name in self._files:
                self._files.pop(name).close()

    def close(self) -> None:
        """Close the files; native memory goes with the model."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._loaded.clear()
