"""A disk that fills up while a GGUF is written: the file is closed and removed, and the error says what to do."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest

from loramix.convert.adapter import convert_adapter
from loramix.convert.export import choose, export_gguf
from loramix.convert.hf.checkpoint import Checkpoint
from loramix.convert.hf.gguf_writer import write_gguf, write_vocabulary
from loramix.convert.hf.vocabulary import Vocabulary, read_vocabulary
from loramix.errors import NoSpace, SelfCheckFailed, Unsupported
from loramix.formats.gguf_output import gguf_output
from loramix.formats.requantize import requantize
from loramix.templates.base_template import with_template
from loramix.templates.chat_template import PLAIN
from tests.hf_tiny import write_bpe, write_checkpoint
from tests.tiny import write_peft

PARTS = [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
]  # SmolLM's pre-tokenizer
LIMIT = 3_000  # bytes; less than each file's metadata or tensors take
pytestmark = pytest.mark.usefixtures("light_native_code")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[io.BufferedWriter]:
    """The output files that ``gguf`` opens during a test."""
    files: list[io.BufferedWriter] = []
    original = gguf.GGUFWriter.open_output_file

    def recorded(self: gguf.GGUFWriter, path: Path | None = None) -> None:
        original(self, path)
        files.extend(self.fout or [])

    monkeypatch.setattr(gguf.GGUFWriter, "open_output_file", recorded)
    return files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint with its tokenizer."""
    pytest.importorskip("tokenizers")
    directory = write_checkpoint(tmp_path_factory.mktemp("source") / "hf")
    write_bpe(directory, PARTS, size=399)
    return directory


@contextmanager
def small_files() -> Iterator[None]:
    """Let no file of this process grow beyond `LIMIT`, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def is_refused(work: Callable[[Path], object], out: Path, opened: list[io.BufferedWriter]) -> str:
    """Run ``work`` on a full disk; check that it closes and removes its file. Returns the message."""
    out.mkdir()
    with small_files(), pytest.raises(NoSpace, match="could not be written to the end") as caught:
        work(out / "out.gguf")
    assert opened
    assert all(file.closed for file in opened)
    assert not list(out.iterdir())
    return str(caught.value)


def test_exports_of_a_pack_close_their_files(
    tiny_pack: Path, tmp_path: Path, opened: list[io.BufferedWriter]
) -> None:
    chosen = choose(str(tiny_pack), "sentiment")
    message = is_refused(lambda out: export_gguf(chosen, out), tmp_path / "out", opened)
    assert "the merged base" in message
    assert message.endswith("write to another disk with --out.")


def test_conversions_of_a_gguf_close_their_files(
    tiny_base: Path, tmp_path: Path, opened: list[io.BufferedWriter]
) -> None:
    types = {"blk.": "Q8_0"}
    message = is_refused(lambda out: requantize(tiny_base, out, types, fix="do."), tmp_path / "a", opened)
    assert message.endswith("; do.")
    is_refused(lambda out: with_template(tiny_base, out, PLAIN), tmp_path / "b", opened)
    source = write_peft(tmp_path / "peft")
    message = is_refused(lambda out: convert_adapter(source, tiny_base, out), tmp_path / "c", opened)
    assert str(tmp_path / "c" / "out.gguf") in message


def test_conversions_of_a_checkpoint_close_their_files(
    checkpoint: Path, tmp_path: Path, opened: list[io.BufferedWriter]
) -> None:
    with Checkpoint(checkpoint) as read:
        vocabulary = read_vocabulary(checkpoint, read.config.vocab_size)
        is_refused(lambda out: write_gguf(read, vocabulary, out, "F32"), tmp_path / "base", opened)
    with small_files(), pytest.raises(NoSpace, match="set TMPDIR"):
        write_vocabulary(vocabulary, tmp_path / "vocabulary.gguf")
    assert all(file.closed for file in opened)


@pytest.mark.parametrize(
    "error", [Unsupported("too large"), SelfCheckFailed("not finite"), KeyboardInterrupt()]
)
def test_any_other_failure_closes_the_file(
    error: BaseException, tmp_path: Path, opened: list[io.BufferedWriter]
) -> None:
    with pytest.raises(type(error)), gguf_output(tmp_path / "out.gguf", "llama") as writer:
        writer.write_header_to_file()
        raise error
    assert len(opened) == 1
    assert opened[0].closed


@pytest.mark.parametrize("size", [2976, 3200, 4064])
def test_a_tensor_that_numpy_loses_silently_is_noticed(
    size: int, tmp_path: Path, opened: list[io.BufferedWriter]
) -> None:
    with (
        small_files(),
        pytest.raises(NoSpace, match="No space left"),
        gguf_output(tmp_path / "out.gguf", "llama") as writer,
    ):
        writer.add_tensor("blk.0", np.ones(size // 4, np.float32))  # smaller than the buffer of C's fwrite
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    assert opened[0].closed


def test_other_errors_of_the_system_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), gguf_output(tmp_path / "out.gguf", "llama"):
        raise PermissionError(13, "Permission denied")


def test_the_vocabulary_is_complete_without_a_limit(checkpoint: Path, tmp_path: Path) -> None:
    vocabulary: Vocabulary = read_vocabulary(checkpoint, 400)
    write_vocabulary(vocabulary, tmp_path / "vocabulary.gguf")
    assert gguf.GGUFReader(tmp_path / "vocabulary.gguf").fields["tokenizer.ggml.model"].contents() == "gpt2"
