"""Exports a mix of a pack for other programs: as one GGUF LoRA, or merged into the base.

The exported model does not route; it answers every prompt with this mix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from loramix.convert.merge import merge
from loramix.convert.selfcheck import PROBES, logits_of, mean_kl, same_argmax
from loramix.errors import SelfCheckFailed, Unsupported, UsageError, WrongBase
from loramix.formats.validate import INVOCATION, BaseShape, check_adapter, read_base
from loramix.models import bases
from loramix.models.fuse import Value, fuse
from loramix.models.mixing import Mix
from loramix.pack.pack import Pack
from loramix.paths import atomic_path, need_space, write_bytes
from loramix.prompts import as_messages
from loramix.templates.base_template import check_template
from loramix.templates.chat_template import ChatTemplate


@dataclass(frozen=True)
class Chosen:
    """A mix of a pack with its adapters, checked against the base."""

    pack: Pack
    mix: Mix
    base: Path
    shape: BaseShape
    parts: list[tuple[bytes, float]] = field(repr=False)
    """Each skill's adapter with its scale."""
    late: dict[str, tuple[int, ...]]
    """Invocation tokens of each activated adapter, by skill."""

    @property
    def name(self) -> str:
        """Name for exported files, made of the skills' names."""
        return "-".join(self.mix.scales)[:100]

    @property
    def metadata(self) -> dict[str, Value]:
        """Metadata of an exported file."""
        base = self.pack.manifest.base
        return {
            "loramix.mix": str(self.mix),
            "loramix.pack": self.pack.name,
            "loramix.base.name": base.name,
            "loramix.base.sha256": base.sha256,
        }


@dataclass(frozen=True, slots=True)
class Distance:
    """Difference between a merged base and the running mix, over all positions of some prompts."""

    mean_kl: float
    """Mean Kullback-Leibler divergence, running mix to merged base, nats per token."""
    same_argmax: float
    """Share of positions where both choose the same token."""
    bare_kl: float
    """The same divergence of the bare base, for comparison."""


def choose(pack: str, mix: str) -> Chosen:
    """Read the adapters and the base of a mix, and check that they match.

    Args:
        pack: name or directory.
        mix: text for `Mix.parse`.

    Raises:
        UsageError: the mix has no skill.
        UnknownSkill, InvalidMix: not a mix of this pack.
        WrongBase: the base on this machine is not the pack's.
    """
    found, parsed = Pack.load(pack), Mix.parse(mix)
    if not parsed:
        raise UsageError("the mix names no skill; write it as in --mix 'sentiment=0.7,summarize=0.3'.")
    entries = [found.skill(name) for name in parsed.scales]
    reference = found.manifest.base
    base = bases.resolve(reference.name)
    if (digest := bases.digest(base)) != reference.sha256:
        raise WrongBase(
            f"pack {found.name} is for base {reference.name} ({reference.sha256[:12]}); {base.name} is {digest[:12]}: "
            f"get the pack's base with 'loramix pull {reference.name}'."
        )
    _, shape = read_base(base)
    check_template(base)
    parts, late = list[tuple[bytes, float]](), dict[str, tuple[int, ...]]()
    for entry in entries:
        content = found.adapter_bytes(entry.name)
        info = check_adapter(content, shape, f"{found.name}/{entry.name}", base_sha256=digest)
        parts.append((content, parsed.scales[entry.name]))
        if info.invocation:
            late[entry.name] = info.invocation
    return Chosen(found, parsed, base, shape, parts, late)


def export_adapter(chosen: Chosen, out: Path) -> None:
    """Write the mix as one GGUF LoRA, for use at scale 1.

    The file is an activated adapter if all adapters of the mix are, with the same invocation tokens; otherwise it
    is active on all tokens, as at run time.
    """
    metadata = {"general.name": chosen.name, **chosen.metadata}
    starts = set(chosen.late.values())
    if len(starts) == 1 and len(chosen.late) == len(chosen.parts):
        metadata[INVOCATION] = starts.pop()
    content = fuse(chosen.parts, metadata)
    need_space(out, len(content), "the adapter")
    write_bytes(out, content)


def export_gguf(chosen: Chosen, out: Path, quant: str | None = None) -> Distance:
    """Write the base with the mix merged into it, if the result is closer to the running mix than the bare base.

    Args:
        chosen: the mix to merge.
        out: the GGUF to write.
        quant: see `loramix.convert.merge.merge`.

    Raises:
        UsageError: ``out`` is the base.
        Unsupported: an activated adapter, or a type that cannot be written.
        NoSpace: the disk has too little free space.
        SelfCheckFailed: rounding cancels the effect of the mix; nothing is written.
    """
    if chosen.late:
        raise Unsupported(
            f"skill {next(iter(chosen.late))} is active on answers only, and merged weights would be active on prompts "
            "too: export it with 'loramix export adapter', or train it with activation = 'always'."
        )
    if out.resolve() == chosen.base.resolve():
        raise UsageError(f"{out} is the base itself; name another file.")
    with atomic_path(out) as temporary:
        merge(
            chosen.base,
            chosen.parts,
            temporary,
            quant=quant,
            metadata={key: str(value) for key, value in chosen.metadata.items()},
        )
        found = distance(chosen, temporary)
        if not found.mean_kl < found.bare_kl:
            raise SelfCheckFailed(
                f"in {quant or 'its own type'} the merged base is no closer to {chosen.mix} (KL {found.mean_kl:.4f}) "
                f"than the bare base ({found.bare_kl:.4f}): rounding cancels the mix; use --quant Q8_0 or F16."
            )
    return found


def distance(chosen: Chosen, merged: Path) -> Distance:
    """Compare a merged base with the running mix, on prompts in the base's chat template.

    Args:
        chosen: the mix.
        merged: a GGUF base with that mix in its weights.
    """
    texts = [text for name in chosen.mix.scales if (text := chosen.pack.skill(name).example)][:2]
    template = vocabulary(chosen.base).template
    prompts = [template.segments(as_messages(text)) for text in [*texts, *PROBES[:2]]]
    running, _ = logits_of(chosen.base, chosen.shape, [(fuse(chosen.parts), 1.0)], prompts)
    bare, _ = logits_of(chosen.base, chosen.shape, [], prompts)
    alone, _ = logits_of(merged, read_base(merged)[1], [], prompts)
    return Distance(mean_kl(running, alone), same_argmax(running, alone), mean_kl(running, bare))


class Vocabulary(NamedTuple):
    """The part of a base's vocabulary that prompts need."""

    template: ChatTemplate
    bos: str
    """Text of the token that the tokenizer adds at the beginning; empty if it adds none."""
    ends: tuple[str, ...]
    """Control tokens that end an answer, including those that llama.cpp does not know by itself."""


def vocabulary(base: Path) -> Vocabulary:
    """Read the chat template and special tokens of a base.

    Args:
        base: a validated GGUF base.
    """
    from loramix.runtime.llama.model import Model

    with Model(base, vocab_only=True) as model:
        bos = model.text(model.bos) if model.add_bos and model.bos >= 0 else ""
        ends = [model.eot, model.eos, *(i for i in model.unknown_ends if not model.piece(i))]
        return Vocabulary(model.template, bos, tuple(model.text(i) for i in ends if i >= 0))
