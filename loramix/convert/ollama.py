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
    """Text before the role."""
    between: str
    """Text between the role and the message."""
    after: str
    system: str | None = None
    """System message of conversations without one."""
    preface: str = ""
    """Text that the template puts before every system message, including the default one."""
    assistant: str = "assistant"
    """The template's name of the assistant role."""
    joint: str | None = None
    """Separator if the system message is put before the first user's text; None if it has its own turn."""

    def turn(self, role: str, content: str) -> str:
        """Render one turn."""
        return f"{self.before}{role}{self.between}{content}{self.after}"

    def render(self, messages: Sequence[Message]) -> str:
        """Render a conversation without the token at its beginning, up to the header of the answer."""
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
        """Return the Go template for Ollama, where ``.Messages`` include SYSTEM (template/template.go)."""
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
    """Return the family of a base's chat template.

    Args:
        template: the base's chat template.
        bos: text of the token at the beginning of a sequence, which Ollama's tokenizer adds by itself.

    Raises:
        Unsupported: the template belongs to no known family, or adds text that a Go template cannot express.
    """
    try:
        rendered = [template.render(chat).removeprefix(bos) for chat in _TRIALS]
    except (InvalidArtifact, InvalidPrompt):  # some templates reject system messages
        rendered = []
    for family in FAMILIES if rendered else ():
        found = _with_system(family, rendered)
        unwritable = "{{" in found.preface or _QUOTES in found.preface + (found.system or "")
        unwritable |= found.system == ""  # Ollama omits the turn of an empty SYSTEM
        if [found.render(chat) for chat in _TRIALS] == rendered and not unwritable:
            return found
    raise Unsupported(
        f"this base's chat template is not one of {', '.join(family.family for family in FAMILIES)}, so it cannot be "
        "written for Ollama; export the mix with 'loramix export gguf'."
    )


def _with_system(family: Turns, rendered: Sequence[str]) -> Turns:
    """Add the system message and preface, found by comparing renderings with and without a system message."""
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
    """Return the text of a Modelfile (ollama, docs/modelfile and parser/parser.go).

    Args:
        turns: family of the base's chat template.
        gguf: name of the model's file in the same directory.
        n_ctx: context size in tokens.
        max_tokens: longest answer in tokens.
        stops: texts that end an answer.
        licenses: licence texts.
    """
    lines = [f"FROM ./{gguf}", f"TEMPLATE {_quoted(turns.go())}"]
    if turns.system:
        lines.append(f"SYSTEM {_quoted(turns.system)}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    # Ollama samples and penalizes repetition by default
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    lines += [f"PARAMETER num_ctx {n_ctx}", f"PARAMETER num_predict {max_tokens}"]
    lines += [f"LICENSE {_quoted(text)}" for text in licenses if _QUOTES not in text]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f"{_QUOTES}{text}{_QUOTES}"


def export_ollama(chosen: Chosen, out: Path, *, quant: str | None = None, n_ctx: int = N_CTX) -> Distance:
    """Write a directory for ``ollama create``: the merged GGUF, its Modelfile and a README.

    Args:
        chosen: the mix to merge.
        out: directory to create.
        quant: see `loramix.convert.merge.merge`.
        n_ctx: context size in tokens; limited to the base's context length.

    Raises:
        UsageError: the directory already exists.
        Unsupported: an activated adapter, or a chat template of no known family.
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

This model does not route: it answers every prompt with this mix.
Only Loramix runs the gate that chooses the skill of a prompt.
Next-token distributions differ from the running mix by a mean KL of {found.mean_kl:.4f} nats
(the bare base: {found.bare_kl:.4f}).
"""
