"""A mix for Ollama: the Modelfile by Ollama's grammar, and its prompts by the runtime's own template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from chat_families import FAMILIES
from click.testing import CliRunner
from test_export import pack_of
from tiny import TEMPLATE as CHATML
from tiny import write_base

from loramix import Engine
from loramix.cli import main
from loramix.convert.export import choose
from loramix.convert.ollama import Turns, export_ollama, modelfile, recognise
from loramix.errors import Unsupported, UsageError
from loramix.templates.chat_template import ChatTemplate

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_DATED = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n' + system"
    " + '<|eot_id|>' }}" + LLAMA.removeprefix("{{ bos_token }}")
)
QWEN = (
    "{%- if tools %}{{- raise_exception('no tools here') }}{%- elif messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>system\nYou are Qwen. You are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' or (message.role == 'system' and not loop.first)"
    " or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
EMPTY = FAMILIES["ChatML with tools"].replace("You are helpful.", "")
QWEN_3 = EMPTY.replace("{%- elif messages[0].role != 'system' %}", "{%- elif false %}")
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + (message['content'] | trim)"
    " + '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
TEMPLATES = {
    "ChatML": (CHATML, "", "</s>"),
    "ChatML with a system message": (SMOL, "", "</s>"),
    "Zephyr": (ZEPHYR, "<s>", "</s>"),
    "Llama 3": (LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "Llama 3 with a preface": (LLAMA_DATED, "<|begin_of_text|>", "<|eot_id|>"),
    "ChatML of Qwen 2.5": (QWEN, "", "<|im_end|>"),
    "ChatML of Qwen 3": (QWEN_3, "", "<|im_end|>"),
    "Gemma 3": (GEMMA, "<bos>", "<eos>"),
}
CHATS: list[list[tuple[str, str]]] = [
    [("user", "Is it 5 o'clock?")],
    [("system", "Say less."), ("user", 'A "quoted"\n\n{{ .Role }} text')],
    [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def messages(chat: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def parse(text: str) -> list[tuple[str, str]]:
    """Instructions of a Modelfile, strictly: one per line, values bare, quoted, or in three quotes over lines."""
    found = []
    while text:
        line, _, rest = text.partition("\n")
        if not line.strip() or line.startswith("#"):
            text = rest
            continue
        word = re.match(r"(FROM|PARAMETER|TEMPLATE|SYSTEM|ADAPTER|LICENSE|MESSAGE) +(?=\S)", text)
        assert word, f"no instruction: {line!r}"
        name, text = word[1], text[word.end() :]
        if name in ("PARAMETER", "MESSAGE"):
            first = re.match(r"([a-z_]+) +(?=\S)", text)
            assert first, f"{name} without a name: {line!r}"
            if name == "MESSAGE":
                assert first[1] in ("system", "user", "assistant")
            name, text = f"{name} {first[1]}", text[first.end() :]
        value = re.match(r'"""(.*?)"""(?:\n|$)|"([^"\n]*)"(?:\n|$)|([^"\n]+)(?:\n|$)', text, re.DOTALL)
        assert value, f"value of {name} is not closed: {text[:60]!r}"
        found.append((name, next(part for part in value.groups() if part is not None)))
        text = text[value.end() :]
    assert [name for name, _ in found].count("FROM") == 1
    return found


def go(template: str, chat: Sequence[dict[str, str]]) -> str:
    """What Ollama renders: the part of Go's text/template that is used here, and nothing else of it."""
    pieces = re.split(r"(\{\{.*?\}\})", template)
    system = "\n\n".join(message["content"] for message in chat if message["role"] == "system")
    variables: dict[str, str] = {}

    def value(word: str, scope: dict[str, str] | None) -> str:
        if word.startswith("$"):
            return variables[word]
        if word.startswith('"'):
            return word[1:-1]
        if word == ".System":
            assert scope is None, "inside range the dot is a message"
            return system
        assert scope is not None and word in (".Role", ".Content"), f"no such field here: {word}"
        return scope[word[1:].lower()]

    def end_of(start: int) -> int:
        depth = 1
        for at in range(start, len(pieces)):
            action = pieces[at][2:-2].strip() if pieces[at].startswith("{{") else ""
            depth += action.startswith(("range", "if")) - (action == "end")
            if not depth:
                return at
        raise AssertionError("a block is not closed")

    def block(start: int, stop: int, scope: dict[str, str] | None) -> str:
        out, at = "", start
        while at < stop:
            piece, at = pieces[at], at + 1
            words = piece[2:-2].split() if piece.startswith("{{") else None
            if words is None:
                out += piece
            elif words == ["range", ".Messages"]:
                assert scope is None
                end = end_of(at)
                out += "".join(block(at, end, message) for message in chat)
                at = end + 1
            elif words[0] == "if":
                end = end_of(at)
                test, *names = words[1:] if len(words) > 2 else ["ne", words[1], '""']
                assert test in ("eq", "ne")
                if (value(names[0], scope) == value(names[1], scope)) == (test == "eq"):
                    out += block(at, end, scope)
                at = end + 1
            elif len(words) == 3:
                assert words[0].startswith("$") and (words[1] == ":=") == (words[0] not in variables)
                variables[words[0]] = value(words[2], scope)
            else:
                (word,) = words
                out += value(word, scope)
        return out

    return block(0, len(pieces), None)


def as_ollama(instructions: list[tuple[str, str]], chat: list[dict[str, str]]) -> str:
    """The prompt of a chat: the Modelfile's SYSTEM goes before a chat that brings none."""
    values = dict(instructions)
    if "SYSTEM" in values and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": values["SYSTEM"]}, *chat]
    return go(values["TEMPLATE"], chat)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_the_runtimes_own(name: str) -> None:
    source, bos, eos = TEMPLATES[name]
    template = ChatTemplate(source, {"bos_token": bos, "eos_token": eos})
    found = recognise(template, bos)
    assert name.startswith(found.family)
    text = modelfile(found, "x.gguf", n_ctx=512, max_tokens=9, stops=[found.after.strip()])
    for chat in map(messages, CHATS):
        assert as_ollama(parse(text), chat) == template.render(chat).removeprefix(bos)


def test_a_system_message_of_gemma_is_written_once() -> None:
    """With Ollama's ``.System``, which is all system messages of the chat."""
    template = recognise(ChatTemplate(GEMMA, {"bos_token": "<bos>"}), "<bos>").go()
    said = go(template, messages(CHATS[3]))
    assert said == (
        "<start_of_turn>user\nS\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>user\nc"
        "<end_of_turn>\n<start_of_turn>model\nd<end_of_turn>\n<start_of_turn>user\ne<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def test_the_system_message_of_qwen_gives_way_to_another() -> None:
    turns = recognise(ChatTemplate(QWEN))
    assert turns.system == "You are Qwen. You are a helpful assistant."
    instructions = parse(modelfile(turns, "x.gguf", n_ctx=1, max_tokens=1, stops=[]))
    assert "Qwen" in as_ollama(instructions, messages(CHATS[0]))
    assert "Qwen" not in as_ollama(instructions, messages(CHATS[1]))


def test_chats_outside_the_trials_are_rendered_by_the_family_too() -> None:
    assert Turns("x", "<", ":", ">", system="s").render(messages(CHATS[2])) == "<system:s><user:Hi>" + (
        "<assistant:Hello!><user:Bye><assistant:"
    )


UNKNOWN = {
    "Llama 2": "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}",
    "no system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML,
    "numbered turns": CHATML.replace("message['role'] +", "message['role'] + loop.index | string +"),
    "a mark of Go": LLAMA_DATED.replace("Cutting", "{{"),
    "Gemma 2, which takes no system message": FAMILIES["Gemma"],
    "turns of Gemma that are numbered": GEMMA.replace(
        "'<end_of_turn>", "loop.index | string + '<end_of_turn>"
    ),
    "a system message without text": EMPTY,
    "three quotes": SMOL.replace("SmolLM", '"""'),
    "nothing": "",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_templates_are_refused(name: str) -> None:
    with pytest.raises(Unsupported, match="not one of ChatML, Zephyr, Llama 3, Gemma"):
        recognise(ChatTemplate(UNKNOWN[name]))


def test_a_modelfile_in_full() -> None:
    turns = Turns("ChatML", "<|im_start|>", "\n", "<|im_end|>\n", system="Be kind.")
    stops, licenses = ["<|im_end|>", "</s>"], ["Apache-2.0\nand more", 'with """']
    text = modelfile(turns, "mood.gguf", n_ctx=1024, max_tokens=6, stops=stops, licenses=licenses)
    assert parse(text) == [
        ("FROM", "./mood.gguf"),
        (
            "TEMPLATE",
            "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        ),
        ("SYSTEM", "Be kind."),
        ("PARAMETER stop", "<|im_end|>"),
        ("PARAMETER stop", "</s>"),
        ("PARAMETER temperature", "0"),
        ("PARAMETER repeat_penalty", "1"),
        ("PARAMETER num_ctx", "1024"),
        ("PARAMETER num_predict", "6"),
        ("LICENSE", "Apache-2.0\nand more"),
    ]


def test_the_grammar_is_strict() -> None:
    opened = ('TEMPLATE """open', "PARAMETER stop", 'SYSTEM "a', 'SYSTEM """a""" b', "FROM ./y")
    for bad in ("FORM ./x", "SYSTEM a", *(f"FROM ./x\n{line}" for line in opened)):
        with pytest.raises(AssertionError):
            parse(bad)
    assert parse('# why\nFROM ./x\n\nMESSAGE user "hi"\n') == [("FROM", "./x"), ("MESSAGE user", "hi")]


def test_a_directory_for_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged model's own runtime reads the prompt that Ollama would write as the pack's engine does."""
    monkeypatch.setenv("LORAMIX_EXTRA_BUFTS", "0")
    monkeypatch.setattr("loramix.hardware.default_threads", lambda: 1)
    pack = pack_of(tmp_path, write_base(tmp_path / "base.gguf", template=SMOL))
    out = tmp_path / "for ollama"
    words = ["export", "ollama", "--mix", "mood", "--pack", str(pack), "-o", str(out), "--ctx", "4096"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "routing is not exported" in result.stderr and "KL to the running mix" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "README.md", "mood.gguf"]
    assert "This model does not route" in (out / "README.md").read_text()
    instructions = parse((out / "Modelfile").read_text())
    values = dict(instructions)
    assert values["FROM"] == "./mood.gguf"
    assert values["SYSTEM"] == "You are a helpful AI assistant named SmolLM."
    assert (values["PARAMETER num_ctx"], values["PARAMETER num_predict"]) == ("512", "9")
    assert [value for name, value in instructions if name == "PARAMETER stop"] == ["<|im_end|>"]
    assert values["LICENSE"] == "Adapters of pack mypack: Apache-2.0"
    with Engine.open(pack, n_ctx=512, n_threads=1) as engine:
        for chat in map(messages, CHATS):
            prompt = as_ollama(instructions, chat)
            assert engine.model.tokenize(prompt, special=True) == engine.model.chat(chat)
    with pytest.raises(UsageError, match="exists already"):
        export_ollama(choose(str(pack), "mood"), out)


def test_nothing_is_left_of_what_is_refused(tmp_path: Path) -> None:
    pack = pack_of(tmp_path, write_base(tmp_path / "base.gguf", template=UNKNOWN["Llama 2"]))
    with pytest.raises(Unsupported, match="chat template"):
        export_ollama(choose(str(pack), "mood"), tmp_path / "x")
    (tmp_path / "late").mkdir()
    late = pack_of(tmp_path / "late", write_base(tmp_path / "b.gguf"), alora_invocation_tokens=[3])
    with pytest.raises(Unsupported, match="is active on answers only"):
        export_ollama(choose(str(late), "mood"), tmp_path / "x")
    assert not list(tmp_path.glob("*x*"))
