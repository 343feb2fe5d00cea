"""Loads adapters into native memory on demand: one adapter per mix, with the skills of a blend fused.

The adapter files stay open, so that a pack that changes on disk does not affect an engine before it reloads.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path

from loramix.defaults import MIX_PARTS, NATIVE_ADAPTERS
from loramix.errors import InvalidArtifact, NotFound, UnknownSkill
from loramix.formats.validate import MAX_ADAPTER_BYTES, BaseShape, check_adapter
from loramix.models.fuse import Part, fuse
from loramix.models.mixing import Mix
from loramix.pack.pack import Pack
from loramix.runtime.llama.model import Adapter, Model, quantize_rows


class AdapterFile:
    """A skill's adapter file, held open; its digest is checked at each read.

    Args:
        path: the GGUF adapter.
        sha256: expected SHA-256 of its bytes.
        check: validates the bytes and returns the invocation tokens; called once, at the first use, so that
            packs of many skills open quickly.

    Raises:
        NotFound: the file does not exist.
    """

    def __init__(self, path: Path, sha256: str, check: Callable[[bytes], tuple[int, ...]]) -> None:
        if not path.is_file():  # a pipe or a device would block
            raise NotFound(f"{path} is not there; get the pack again, or remove the skill and add it again.")
        self.path, self.sha256, self._check = path, sha256, check
        self._file = path.open("rb")

    @classmethod
    def of(cls, pack: Pack, name: str, shape: BaseShape) -> AdapterFile:
        """Open a skill's file in a pack, to be validated against the base's shape."""
        where, base = f"{pack.name}/{name}", pack.manifest.base.sha256

        def check(content: bytes) -> tuple[int, ...]:
            return check_adapter(content, shape, where, base_sha256=base).invocation

        return cls(pack.adapter_path(name), pack.skill(name).sha256, check)

    @classmethod
    def changed(cls, old: Pack, new: Pack, shape: BaseShape) -> dict[str, AdapterFile]:
        """Open and validate the files of the skills that are new, or have changed, since a pack was read."""
        known = {skill.name: skill.sha256 for skill in old.skills}
        names = [skill.name for skill in new.skills if known.get(skill.name) != skill.sha256]
        files: dict[str, AdapterFile] = {}
        try:
            for name in names:
                files[name] = cls.of(new, name, shape)
                _ = files[name].invocation
        except BaseException:
            for file in files.values():
                file.close()
            raise
        return files

    @cached_property
    def invocation(self) -> tuple[int, ...]:
        """Invocation tokens; empty means always active.

        Raises:
            InvalidArtifact, WrongBase: the file failed validation.
        """
        return self._check(self._read())

    def read(self) -> bytes:
        """Read and validate the file.

        Raises:
            InvalidArtifact: the file has changed, or failed validation.
            WrongBase: the adapter is for another base.
        """
        content = self._read()
        if "invocation" not in vars(self):
            self.invocation = self._check(content)
        return content

    def _read(self) -> bytes:
        self._file.seek(0)
        content = self._file.read(MAX_ADAPTER_BYTES + 1)
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise InvalidArtifact(
                f"{self.path} has SHA-256 {found[:12]}…, its pack needs {self.sha256[:12]}…: it has changed since "
                "it was made; get the pack again, or remove the skill and add it again."
            )
        return content

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class AdapterCache:
    """At most ``size`` adapters in native memory; evicts the least recently used that no context uses.

    Args:
        model: the base.
        size: maximum number of adapters.
        quantized: quantize adapters to 8 bits, for a quantized base; otherwise load them in floats.
    """

    def __init__(self, model: Model, size: int = NATIVE_ADAPTERS, *, quantized: bool = False) -> None:
        self._model, self._size = model, size
        self._quantize = quantize_rows if quantized else None
        self._files: dict[str, AdapterFile] = {}
        self._loaded: OrderedDict[Mix, Adapter] = OrderedDict()
        self._parts: OrderedDict[str, Part] = OrderedDict()

    def put(self, name: str, file: AdapterFile) -> None:
        """Register a skill's file; does not load it."""
        self._files[name] = file

    def get(self, mix: Mix) -> list[tuple[Adapter, float]]:
        """Return the one adapter of a mix with its scale; an empty list for the empty mix.

        Raises:
            UnknownSkill: the mix names a skill that is not registered.
        """
        self._require(mix)
        if not mix:
            return []
        # a single skill is one adapter for any scale; a blend includes its scales
        skills = list(mix.scales)
        key, scale = (mix, 1.0) if len(skills) > 1 else (Mix.of({skills[0]: 1.0}), mix.scales[skills[0]])
        if key not in self._loaded:
            content = fuse(
                [(self._part(name), weight) for name, weight in key.items()], quantize=self._quantize
            )
            self._shrink(self._size - 1)
            self._loaded[key] = self._model.load_adapter(content, str(key))
        self._loaded.move_to_end(key)
        return [(self._loaded[key], scale)]

    def _part(self, name: str) -> Part:
        """Return a skill's matrices, cached for blends of the same skills at other scales."""
        if name not in self._parts:
            part = Part.read(self._files[name].read(), self._quantize)
            while len(self._parts) >= MIX_PARTS:
                self._parts.popitem(last=False)
            self._parts[name] = part
        self._parts.move_to_end(name)
        return self._parts[name]

    def unfused(self, mix: Mix) -> dict[str, Adapter]:
        """Return the adapters of a mix's skills, unfused, at scale 1; valid until the next call."""
        size, self._size = self._size, max(self._size, len(mix.scales))
        try:
            return {name: self.get(Mix.of({name: 1.0}))[0][0] for name in mix.scales}
        finally:
            self._size = size

    def invocation(self, mix: Mix) -> tuple[int, ...]:
        """Return the invocation tokens that all skills of a mix share, else an empty tuple."""
        self._require(mix)
        found = {self._files[name].invocation for name in mix.scales}
        return found.pop() if len(found) == 1 else ()

    def _require(self, mix: Mix) -> None:
        if unknown := sorted(mix.scales.keys() - self._files.keys()):
            raise UnknownSkill(
                f"no skill {unknown[0]!r} here; there are: {', '.join(self._files) or 'none'}."
            )

    @property
    def mixes(self) -> list[Mix]:
        """Mixes in native memory, least recently used first."""
        return list(self._loaded)

    def _shrink(self, size: int) -> None:
        for key in list(self._loaded):
            if len(self._loaded) <= size:
                return
            if not self._loaded[key].in_use:
                self._loaded.pop(key).close()

    def drop(self, skills: Collection[str]) -> None:
        """Remove skills and free their adapters, which no context may use any more."""
        for key in [key for key in self._loaded if not key.scales.keys().isdisjoint(skills)]:
            self._loaded.pop(key).close()
        for name in skills:
            self._parts.pop(name, None)
            if name in self._files:
                self._files.pop(name).close()

    def close(self) -> None:
        """Close the files; native memory is freed with the model."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._parts.clear()
        self._loaded.clear()
