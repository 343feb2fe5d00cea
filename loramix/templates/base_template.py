"""Checks or replaces the chat template of a GGUF base."""

from __future__ import annotations

from pathlib import Path

from loramix.errors import UsageError
from loramix.formats.gguf_output import gguf_output
from loramix.formats.requantize import architecture_of, copy_metadata
from loramix.formats.validate import read_base
from loramix.paths import atomic_path, need_space
from loramix.templates.chat_template import usable_template

KEY = "tokenizer.chat_template"
_NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
}  # in place of the base's tokens, which would need its vocabulary


def check_template(base: Path) -> None:
    """Check that a base has a usable chat template.

    Args:
        base: a GGUF base.

    Raises:
        InvalidArtifact: the base has no usable chat template; the message has the fix.
        NotFound, Unsupported: see `read_base`.
    """
    found = read_base(base)[0].metadata.get(KEY)
    usable_template(found if isinstance(found, str) else "", _NAMED, str(base))


def with_template(source: Path, out: Path, template: str) -> None:
    """Copy a GGUF base with another chat template.

    Args:
        source: a GGUF base.
        out: file to write atomically.
        template: Jinja text.

    Raises:
        UsageError: ``out`` is the source itself, or a directory.
        InvalidArtifact: the template cannot be used, or the source is damaged.
    """
    import gguf

    if out.is_dir() or (out.exists() and out.samefile(source)):
        raise UsageError(f"{out} is a directory or the base itself; name another file with --out.")
    read_base(source)
    usable_template(template, _NAMED, "the base with this template")
    reader = gguf.GGUFReader(source)
    with atomic_path(out) as temporary:
        need_space(out, source.stat().st_size, out.name)
        with gguf_output(temporary, architecture_of(reader), name=str(out)) as writer:
            copy_metadata(reader, writer, but={KEY})
            writer.add_chat_template(template)
            for tensor in reader.tensors:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    read_base(out)
