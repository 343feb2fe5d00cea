"""Locates the tensors of a Hugging Face checkpoint.

Checks everything before it reads the first value: missing shards, shards of another checkpoint, and names and
shapes that do not match the settings. Independent of GGUF and tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy.typing as npt

from loramix.convert.hf.config import expected, read_config, read_json
from loramix.convert.wrappers import unwrapped_names
from loramix.errors import InvalidArtifact, NotFound, Unsupported
from loramix.formats.safetensors_reader import Entry, SafetensorsFile

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_BUFFERS = ".rotary_emb.inv_freq"  # older checkpoints store these buffers, which follow from the settings


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class Checkpoint:
    """A checkpoint with validated settings, shards, names and shapes; a context manager.

    Args:
        directory: holds ``config.json`` and ``model.safetensors``, or shards with their index.

    Raises:
        NotFound: a file is missing.
        InvalidArtifact: a file is damaged, or shards of several checkpoints are mixed.
        Unsupported: see `read_config`; also for weights in pickles.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.config = directory, read_config(directory)
        self._stack = ExitStack()
        try:
            self._files = self._open()
            self.tensors = self._check()
        except BaseException:
            self._stack.close()
            raise

    def _open(self) -> dict[str, SafetensorsFile]:
        """Open the files; return the file of each tensor."""
        directory = self.directory
        if not (directory / INDEX).is_file():
            path = directory / SINGLE
            if not path.is_file():
                if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
                    raise Unsupported(
                        f"{directory} contains pickles (.bin, .pth), which can run code: "
                        "get or save the checkpoint as safetensors."
                    )
                lost = INDEX if any(directory.glob("model-*.safetensors")) else SINGLE
                raise NotFound(f"no {lost} in {directory}; {_instead(directory)}.")
            file = self._stack.enter_context(SafetensorsFile(path))
            return dict.fromkeys(file.entries, file)
        index = read_json(directory / INDEX, _Index).weight_map
        files: dict[str, SafetensorsFile] = {}
        for name in sorted(set(index.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InvalidArtifact(
                    f"{directory / INDEX} names {name[:80]!r}, which is not a file in the same directory; "
                    "download it again."
                )
            if not (directory / name).is_file():
                raise NotFound(f"shard {name} is missing in {directory}; download the whole checkpoint.")
            files[name] = self._stack.enter_context(SafetensorsFile(directory / name))
        for name, file in files.items():
            expected_keys = {key for key, shard in index.items() if shard == name}
            if strange := expected_keys ^ file.entries.keys():
                there = "lacks" if min(strange) in expected_keys else "has"
                raise InvalidArtifact(
                    f"shard {file.path} {there} {min(strange)!r}, unlike {INDEX}: "
                    "files of several checkpoints are mixed; download it again."
                )
        return {key: files[shard] for key, shard in index.items()}

    def _check(self) -> dict[str, Entry]:
        shapes, found = expected(self.config), dict[str, Entry]()
        stored, self._stored = unwrapped_names(self._files, str(self.directory)), dict[str, str]()
        for saved, file in self._files.items():
            name = stored[saved]
            if ".lora_" in name or ".base_layer." in name:
                raise Unsupported(
                    f"{file.path} has {saved[:100]!r}: it contains an adapter in addition to the base's weights; "
                    "save the merged model (merge_and_unload, then save_pretrained), or convert only the adapter."
                )
            if name.endswith(_BUFFERS) or (name == "lm_head.weight" and self.config.tie_word_embeddings):
                continue  # transformers ties the head to the embedding even if the file has one
            if name not in shapes:
                raise Unsupported(
                    f"{file.path} has {saved[:100]!r}, which a {self.config.architectures[0]} with these settings "
                    "does not have; supported are plain checkpoints without adapters, experts or other parts."
                )
            found[name] = file.entries[saved]
            self._stored[name] = saved
            if found[name].shape != shapes[name]:
                raise InvalidArtifact(
                    f"{file.path}: {name} is {_by(found[name].shape)}, config.json requires "
                    f"{_by(shapes[name])}: files of several checkpoints are mixed; download it again."
                )
        if missing := [name for name in shapes if name not in found]:
            raise InvalidArtifact(
                f"{self.directory} lacks {missing[0]} and {len(missing) - 1} other tensors that config.json "
                "requires; download the whole checkpoint."
                if len(missing) > 1
                else f"{self.directory} lacks {missing[0]}, which config.json requires; "
                "download the whole checkpoint."
            )
        return {name: found[name] for name in shapes}

    def chunks(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """Yield a tensor's values as stored; see `SafetensorsFile.chunks`."""
        saved = self._stored[name]
        return self._files[saved].chunks(saved)

    def close(self) -> None:
        """Close all files; may be called repeatedly."""
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _instead(directory: Path) -> str:
    """Name what a directory without weights of a checkpoint holds, and what helps."""
    if found := next(iter(sorted(directory.glob("*.gguf"))), None):
        return f"{found.name} in it is a GGUF, which needs no conversion: give that file"
    if (directory / "adapter_config.json").is_file():
        return "it holds an adapter: convert it with 'loramix convert adapter'"
    if any(directory.glob("consolidated*.safetensors")):
        return "consolidated.safetensors has other names: download the files of transformers' format too"
    return "download the whole checkpoint"
