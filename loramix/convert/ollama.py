"""Exports a mix as an Ollama model: the merged GGUF, and a Modelfile with an equivalent prompt template.

Ollama uses Go templates instead of Jinja. A base's template is mapped to one of a few known families with a Go
template, if it renders trial chats exactly as that family does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loramix.convert.export import Chosen, Distance, export_gguf, vocabulary
from loramix.defaults import N_CTX
from loramix.errors import InvalidArtifact, InvalidPrompt, Unsupported, UsageError
from loramix.formats.validate import read_base
from loramix.models.known_bases import BASES
from loramix.paths import atomic_directory, write_text
from loramix.prompts import Message
from loramix.templates.chat_template import ChatTemplate

MODELFILE = "Modelfile"
_QUOTES = '"""'


@dataclass(frozen=True, slots=True)
class Turns:
    """How a family of chat templates writes a conversation: turn after turn, then the answer's header."""

    family: str
    before: str
    """What stands before the role."""
    between: str
    """What stands between the role and the text."""
    after: str
    system: str | None = None
    """System message of conversations that bring none."""
    preface: str = ""
    """What the base puts before every system message, brought or not."""
    assistant: str = "assistant"
    """What the base calls the role that answers."""
    joint: str | None = None
    """Between a system message and the first user's text, which it is put before; None where it has a turn of its
    own."""

    def turn(self, role: str, content: str) -> str:
        """One turn as the base reads it."""
        return f"{self.before}{role}{self.between}{content}{self.after}"

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as the base reads it, without a token for its beginning."""
        chat = list(messages)
        if self.joint is not None and chat[0]["role"] == "system":
            system, *chat = chat
            if chat:
                chat[0] = {**chat[0], "content": system["content"] + self.joint + chat[0]["content"]}
        elif chat[0]["role"] == "system":
            chat[0] = {**chat[0], "content": self.preface + chat[0]["content"]}
        elif self.system is not None or self.preface:
            chat.insert(0, {"role": "system", "content": self.preface + (self.system or "")})
        roles = {"assistant": self.assistant}
        turns = "".join(
            self.turn(roles.get(message["role"], message["role"]), message["content"]) for message in chat
        )
        return f"{turns}{self.before}{self.assistant}{self.between}"

    def go(self) -> str:
        """The same as a Go template for Ollama, whose ``.Messages`` hold its SYSTEM too (template/template.go)."""
        turns = self.turn("{{ .Role }}", "{{ .Content }}")
        if self.joint is not None:
            once = "{{ if $system }}{{ $system }}" + self.joint + '{{ $system = "" }}{{ end }}'
            turns = "{{ $system := .System }}{{ range .Messages }}"
            turns += '{{ if eq .Role "user" }}' + self.turn("user", once + "{{ .Content }}") + "{{ end }}"
            turns += (
                '{{ if eq .Role "assistant" }}' + self.turn(self.assistant, "{{ .Content }}") + "{{ end }}"
            )
            turns += "{{ end }}"
        elif self.preface:
            system = self.turn("system", self.preface + "{{ .System }}")
            turns = f'{system}{{{{ range .Messages }}}}{{{{ if ne .Role "system" }}}}{turns}{{{{ end }}}}{{{{ end }}}}'
        else:
            turns = f"{{{{ range .Messages }}}}{turns}{{{{ end }}}}"
        return f"{turns}{self.before}{self.assistant}{self.between}"


FAMILIES = (
    Turns("ChatML", "<|im_start|>", "\n", "<|im_end|>\n"),
    Turns("Zephyr", "<|", "|>\n", "</s>\n"),
    Turns("Llama 3", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    Turns("Gemma", "<start_of_turn>", "\n", "<end_of_turn>\n", assistant="model", joint="\n\n"),
)
_USER, _ANSWER = (
    {"role": "user", "content": "Is it\nraining?"},
    {"role": "assistant", "content": "Yes, it is."},
)
_SYSTEM, _AGAIN = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Still?"}
_TRIALS: tuple[tuple[Mapping[str, str], ...], ...] = (
    (_USER,),
    (_SYSTEM, _USER),
    (_USER, _ANSWER, _AGAIN),
    (_SYSTEM, _USER, _ANSWER, _AGAIN),
)


def recognise(template: ChatTemplate, bos: str = "") -> Turns:
    """The family of a base's chat template.

    Args:
        template: the base's.
        bos: text of the token that begins a sequence; Ollama's tokenizer puts it there by itself.

    Raises:
        Unsupported: it is of none, or what it adds has no place in a Go template.
    """
    try:
        rendered = [template.render(chat).removeprefix(bos) for chat in _TRIALS]
    except (InvalidArtifact, InvalidPrompt):  # some refuse system messages
        rendered = []
    for family in FAMILIES if rendered else ():
        found = _with_system(family, rendered)
        unwritable = "{{" in found.preface or _QUOTES in found.preface + (found.system or "")
        unwritable |= found.system == ""  # a turn without text: Ollama takes an empty SYSTEM for none
        if [found.render(chat) for chat in _TRIALS] == rendered and not unwritable:
            return found
    raise Unsupported(
        f"this base's chat template is none of {', '.join(family.family for family in FAMILIES)}, so it cannot be "
        "written for Ollama; take the mix along with 'loramix export gguf'."
    )


def _with_system(family: Turns, rendered: Sequence[str]) -> Turns:
    """A family with the system message and preface that two renderings show: without one, and with one."""
    opening = f"{family.before}system{family.between}"
    texts = []
    for text in rendered[:2]:
        inside = text.removeprefix(opening)
        texts.append(None if inside == text else inside.partition(family.after)[0])
    default, given = texts
    preface = (given or "").removesuffix(_SYSTEM["content"])
    if preface and default == preface:
        return replace(family, preface=preface)
    return replace(family, system=default)


def modelfile(
    turns: Turns,
    gguf: str,
    *,
    n_ctx: int,
    max_tokens: int,
    stops: Sequence[str],
    licenses: Sequence[str] = (),
) -> str:
    """The text of a Modelfile (ollama, docs/modelfile and parser/parser.go).

    Args:
        turns: the base's chat template.
        gguf: name of the model's file in the same directory.
        n_ctx: tokens of context.
        max_tokens: longest answer.
        stops: texts that end an answer.
        licenses: texts.
    """
    lines = [f"FROM ./{gguf}", f"TEMPLATE {_quoted(turns.go())}"]
    if turns.system:
        lines.append(f"SYSTEM {_quoted(turns.system)}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    # Ollama's own defaults sample, and punish what was said before
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    lines += [f"PARAMETER num_ctx {n_ctx}", f"PARAMETER num_predict {max_tokens}"]
    lines += [f"LICENSE {_quoted(text)}" for text in licenses if _QUOTES not in text]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f"{_QUOTES}{text}{_QUOTES}"


def export_ollama(chosen: Chosen, out: Path, *, quant: str | None = None, n_ctx: int = N_CTX) -> Distance:
    """Make a directory for ``ollama create``: the merged GGUF, its Modelfile and a README.

    Args:
        chosen: what to merge.
        out: directory to make.
        quant: see `loramix.convert.merge.merge`.
        n_ctx: tokens of context; at most what the base reads.

    Raises:
        UsageError: the directory is there already.
        Unsupported: a late adapter, or a chat template of no known family.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not.")
    metadata = read_base(chosen.base)[0].metadata
    template, bos, ends = vocabulary(chosen.base)
    turns = recognise(template, bos)
    pack = chosen.pack.manifest
    known = BASES.get(pack.base.name)
    base_license = known.license if known else str(metadata.get("general.license", ""))
    licenses = [f"Base model {pack.base.name}: {base_license}"] if base_license else []
    text = modelfile(
        turns,
        f"{chosen.name}.gguf",
        n_ctx=min(n_ctx, chosen.shape.context_length),
        max_tokens=max(chosen.pack.skill(name).max_tokens for name in chosen.mix.scales),
        stops=list(dict.fromkeys(stop for stop in (turns.after.strip(), *ends) if stop)),
        licenses=[*licenses, f"Adapters of pack {pack.name}: {pack.license}"],
    )
    with atomic_directory(out) as temporary:
        found = export_gguf(chosen, temporary / f"{chosen.name}.gguf", quant)
        write_text(temporary / MODELFILE, text)
        write_text(temporary / "README.md", _readme(chosen, found))
    return found


def _readme(chosen: Chosen, found: Distance) -> str:
    return f"""# {chosen.name} for Ollama

The mix `{chosen.mix}` of the Loramix pack {chosen.pack.name}, merged into its base {chosen.pack.manifest.base.name}.

    ollama create {chosen.name} -f {MODELFILE}
    ollama run {chosen.name}

Routing stays behind: every prompt is answered with this one mix, whatever it asks for.
The gate that finds a prompt's skill runs in Loramix alone.
Next-token distributions differ from the running mix by a mean KL of {found.mean_kl:.4f} nats
(the bare base: {found.bare_kl:.4f}).
"""
