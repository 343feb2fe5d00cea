"""A base's chat template: renders conversations as the text that the base was tuned on.

Shared by training, evaluation and serving. The template of a GGUF is untrusted: it runs in
`loramix.templates.sandbox`, and a template that cannot render a prompt is rejected when the base is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

from jinja2 import TemplateError, nodes

from loramix.errors import InvalidArtifact, InvalidPrompt
from loramix.prompts import Message
from loramix.templates.sandbox import Sandbox

Segment: TypeAlias = tuple[str, bool]  # text, and whether to parse special tokens in it

MAX_TEMPLATE_BYTES = 64 * 1024
PLAIN = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
"""For a base that was not tuned to chat: the texts, one per line."""
GIVE_ONE = (
    "give it one with 'loramix convert base SOURCE --out NEW.gguf --chat-template FILE' "
    "(SOURCE: its directory or GGUF; FILE: a Jinja template, or 'plain' for texts without roles)"
)
_USER, _ANSWER, _AGAIN = (
    "4091758263" * 200,
    "7315902846" * 200,
    "5820471936" * 200,
)  # what no template has or changes


class ChatTemplate:
    """A base's chat template, compiled once in the sandbox.

    Args:
        source: Jinja text, as in the GGUF key ``tokenizer.chat_template``.
        special: special tokens by their names in templates, such as ``bos_token`` and ``eos_token``.

    Raises:
        InvalidArtifact: too long, not valid Jinja, or not rendered the same as in transformers.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        if len(source.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
            raise InvalidArtifact(
                f"the chat template has {len(source.encode('utf-8', 'replace'))} bytes; "
                f"at most {MAX_TEMPLATE_BYTES} are accepted."
            )
        self._special = dict(special or {})
        self._sandbox = Sandbox()
        try:
            self._template, tree = self._sandbox.compiled(source)
        except (TemplateError, RecursionError) as error:
            raise InvalidArtifact(f"the chat template is not valid Jinja: {error}.") from None
        literals = {node.data for node in tree.find_all(nodes.TemplateData)}
        literals |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self._literals = "\0".join(literals)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation as the text that the base was tuned on.

        Args:
            messages: checked messages, see `loramix.prompts.as_messages`.
            add_generation_prompt: end with the header of the assistant's answer.

        Raises:
            InvalidArtifact: the template fails, violates the sandbox, or runs too long.
            InvalidPrompt: the template rejects the conversation.
        """
        pieces: list[str] = []
        size = 0
        self._sandbox.start()
        try:
            for piece in self._template.generate(
                **self._special,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            ):
                pieces.append(piece)
                size += len(piece)
                self._sandbox.check(size)
        except (InvalidArtifact, InvalidPrompt):
            raise
        except Exception as error:  # an untrusted template may raise any exception
            raise InvalidArtifact(
                f"the base's chat template failed: {type(error).__name__}: {error}"
            ) from None
        return "".join(pieces)

    def after_answer(self) -> str:
        """Return the template's text after an assistant's message; empty if there is none."""
        chat = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
        try:
            return self.render(chat, add_generation_prompt=False).rpartition(_ANSWER)[2]
        except (InvalidArtifact, InvalidPrompt):
            return ""

    def writes(self, token: str) -> bool:
        """Whether the template's text contains a token; white space does not count."""
        return not token.isspace() and token in self._literals

    def segments(self, messages: Sequence[Message], controls: Iterable[str] = ()) -> list[Segment]:
        """Split a rendered conversation so that a user's text can never become a control token.

        Args:
            messages: checked messages.
            controls: texts of control tokens, which are parsed only in the template's own text.

        Returns:
            Texts in order, each with whether to parse special tokens in it; usually one segment, and more only if
            a message contains the text of a control token.

        Raises:
            InvalidPrompt: the template changes such a text, so that it cannot be located.
        """
        text = self.render(messages)
        controls = tuple(filter(None, controls))
        contents = [message["content"] for message in messages]
        pattern = _pattern(controls)
        harmless = [_harmless(content, controls) for content in contents]
        if harmless == contents:
            return [(text, True)]
        wanted = len(pattern.findall(self.render(_with(messages, harmless))))
        if len(pattern.findall(text)) == wanted:
            return [(text, True)]
        opening, closing = _marks("".join(contents))
        marks = re.compile(f"{opening}({pattern.pattern}){closing}|[{opening}{closing}]")
        inside = [pattern.sub(f"{opening}\\g<0>{closing}", content) for content in contents]
        # texts are marked at their ends only if needed, because templates do not strip a marked text
        for quoted in (inside, [opening + content + closing for content in inside]):
            parts = marks.split(self.render(_with(messages, quoted)))
            found = [(part, i % 2 == 0) for i, part in enumerate(parts) if part]
            if sum(len(pattern.findall(part)) for part, meant in found if meant) == wanted:
                return found
        raise InvalidPrompt(
            "the prompt contains the text of a control token, and the base's template changes it; remove it."
        )


def usable_template(source: str, special: Mapping[str, str] | None, base: str) -> ChatTemplate:
    """Compile a base's chat template and test it on conversations, so that errors occur before the first prompt.

    Args:
        source: Jinja text; empty if the base has none.
        special: see `ChatTemplate`.
        base: name of the base, for messages.

    Raises:
        InvalidArtifact: there is no template, it fails, or it never prints the user's text.
    """
    if not source:
        raise InvalidArtifact(f"{base} has no chat template, which every prompt needs; {GIVE_ONE}.")
    # of two lines, since a template may print the first one alone
    user, again = ({"role": "user", "content": f"{text}\n{text[::-1]}"} for text in (_USER, _AGAIN))
    chats: list[list[Message]] = [
        [user],
        [user, {"role": "assistant", "content": _ANSWER}, again],
        [{"role": "system", "content": _ANSWER}, user],
    ]
    try:
        template = ChatTemplate(source, special)
        for number, chat in enumerate(chats):
            try:
                text = template.render(chat)
            except InvalidPrompt as refusal:
                if number:  # many templates reject system messages
                    continue
                raise InvalidArtifact(f"{refusal}.") from None
            if not all(line in text for line in chat[-1]["content"].splitlines()):
                raise InvalidArtifact("its chat template never prints the user's text.")
    except InvalidArtifact as error:
        raise InvalidArtifact(f"{base} cannot be used: {str(error).rstrip('.')}; {GIVE_ONE}.") from None
    return template


@lru_cache(maxsize=8)
def _pattern(controls: tuple[str, ...]) -> re.Pattern[str]:
    """Return the pattern of all control tokens, the longest first."""
    longest = sorted(controls, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


@lru_cache(maxsize=8)
def _parts(controls: tuple[str, ...]) -> tuple[int, frozenset[str], frozenset[str]]:
    """Return the length of the longest control token, and all beginnings and ends of control tokens."""
    beginnings = frozenset(token[:i] for token in controls for i in range(1, len(token)))
    ends = frozenset(token[i:] for token in controls for i in range(1, len(token)))
    return max(map(len, controls), default=0), beginnings, ends


def _harmless(content: str, controls: tuple[str, ...]) -> str:
    """Change a text so that it contains no control token, also not together with adjacent template text."""
    text = _pattern(controls).sub("x", content)
    longest, beginnings, ends = _parts(controls)
    for i in range(min(longest, len(text)), 0, -1):
        if text[-i:] in beginnings:
            text = text[:-i] + "x"
        if text[:i] in ends:
            text = "x" + text[i:]
    return text


def _with(messages: Sequence[Message], contents: Sequence[str]) -> list[dict[str, str]]:
    return [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]


def _marks(text: str) -> tuple[str, str]:
    """Return two private-use characters that do not occur in a text."""
    used = set(text)
    free = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)
    return next(free), next(free)
