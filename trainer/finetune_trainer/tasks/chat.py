"""Chats as a model reads them: messages through its chat template, and which characters are the assistant's.

Templates are Jinja and are rendered as transformers renders them, in jinja2's immutable sandbox. One thing differs: the
clock (`strftime_now`) is not there, because equal rows must give equal tokens on any day. Templates ask whether it is,
and have a date of their own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from finetune_trainer.data.text import Text
from finetune_trainer.tasks.base import RowError, encodable, kind_of

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
CHATML = ("<|im_start|>", "<|im_end|>")
_START, _END = "\ufdd0", "\ufdd1"
"""Around what a template itself marks as generated; noncharacters, which no text may hold."""
_REASONING = ("reasoning_content", "thinking", "reasoning")

_DEFAULT = """\
{%- if bos %}{{ bos_token }}{% endif %}
{%- for tool in tools or [] %}
    {{- start }}system{{ '\\n' + (tool | tojson) + end + '\\n' }}
{%- endfor %}
{%- for message in messages %}
    {{- start + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}{{ '\\n' + (call | tojson) }}{% endfor %}
    {{- end + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ start + 'assistant\\n' }}{% endif %}
"""


@dataclass(frozen=True)
class Chat:
    """Messages as one text."""

    text: str
    spans: Sequence[tuple[int, int]]
    """Where the assistant's messages are in it, their end tokens included, in characters."""


class ChatTemplate:
    """One template with the special tokens that it may name. Raises RowError where it does not compile."""

    def __init__(self, source: str, *, tokens: Mapping[str, str], specials: Sequence[str]) -> None:
        """`tokens` are what the tokenizer's configuration names, such as bos_token; `specials` all special tokens."""
        self.source = source
        self._tokens = dict(tokens)
        self._specials = tuple(specials)
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise RowError(f"the chat template is no Jinja template ({error})") from error

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a chat, as transformers' apply_chat_template gives it. Raises RowError."""
        return self._marked(messages, tools, add_generation_prompt).replace(_START, "").replace(_END, "")

    def chat(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None) -> Chat:
        """A whole chat, which ends with the assistant. Raises RowError.

        Where the template marks what is generated, that is the assistant's. Elsewhere it is what each of its messages
        adds to the text of those before it: so earlier text must stay as it is when messages follow.
        """
        marked = self._marked(messages, tools, False)
        if _START in marked:
            return _by_marks(marked)
        spans = []
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:place], tools=tools, add_generation_prompt=True)
                upto = self.render(messages[: place + 1], tools=tools)
                if not (upto.startswith(before) and marked.startswith(upto)):
                    raise RowError(
                        "the chat template writes earlier messages otherwise when others follow, so it does not tell "
                        "which tokens are the assistant's; give task.chatTemplate with {% generation %} around them"
                    )
                spans.append((len(before), len(before) + len(self._ended(upto[len(before) :]))))
        return Chat(marked, spans)

    def _ended(self, text: str) -> str:
        """Without the blanks behind the end token: nobody has to learn to write these."""
        bare = text.rstrip()
        return bare if bare.endswith(self._specials) else text

    def _marked(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[_aliased(message) for message in messages],
                tools=list(tools) if tools is not None else None,
                documents=None,
                add_generation_prompt=prompt,
                **self._tokens,
            )
        except TemplateError as error:
            raise RowError(f"the chat template refuses the messages ({error})") from error
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise RowError(f"the chat template fails on the messages ({type(error).__name__}: {error})") from error


def _by_marks(marked: str) -> Chat:
    text, spans = "", []
    for number, part in enumerate(marked.split(_START)):
        if number:
            mine, _, part = part.partition(_END)
            spans.append((len(text), len(text) + len(mine)))
            text += mine
        text += part
    return Chat(text, spans)


def _aliased(message: Message) -> Message:
    """Reasoning by all the names that templates use for it."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generated(Extension):
    """{% generation %} ... {% endgeneration %} puts marks around what is in it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_START}{caller()}{_END}"


class _Names(Namespace):
    """A namespace without underscores."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, *rest = arguments
        values = dict(*rest, **named)
        for name in values:
            _plain(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _plain(name)
        Namespace.__setitem__(self, name, value)


def _plain(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"the name {name!r} is not allowed")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generated, "jinja2.ext.loopcontrols"]
    )

    def fail(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = fail
    environment.globals["namespace"] = _Names
    return environment


# --- which template ---


@dataclass(frozen=True)
class Chats:
    """The template of a run, with its tokenizer."""

    text: Text
    given: str | None
    """task.chatTemplate; None: the base's own, or where it has none, one made of what tokens it has."""

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises RowError."""
        return ChatTemplate(self.source, tokens=self._tokens, specials=self.specials)

    @property
    def source(self) -> str:
        return self.given or self._own or self._default

    @property
    def ours(self) -> bool:
        """Whether the template is not the base's, and so has to be published with the model."""
        return self.source != self._own

    @cached_property
    def specials(self) -> tuple[str, ...]:
        added = self.text.tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    @property
    def _own(self) -> str | None:
        found = self.text.tokenizer_config.get("chat_template")
        if isinstance(found, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default")
        return found if isinstance(found, str) and found.strip() else None

    @property
    def _tokens(self) -> dict[str, str]:
        """As transformers hands them to a template."""
        found = {}
        for name, value in self.text.tokenizer_config.items():
            value = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(value, str):
                found[name] = value
        return found

    @property
    def _default(self) -> str:
        """ChatML where the tokenizer has its tokens; else headings, and the end token behind each message."""
        chatml = set(CHATML) <= set(self.specials)
        start, end = CHATML if chatml else ("### ", self._tokens.get("eos_token", ""))
        begins = self.text.ids(["a"])[0][:1] == [self.text.special("bos")] and "bos_token" in self._tokens
        settings = f"{{%- set start = {json.dumps(start)} %}}\n{{%- set end = {json.dumps(end)} %}}\n"
        return settings + f"{{%- set bos = {str(begins).lower()} %}}\n" + _DEFAULT


# --- rows ---


def messages_of(value: Any, column: str) -> list[dict[str, Any]]:
    """A list of messages, each an object with role and content. Raises RowError."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"the column {column!r} must hold a list of messages, found {kind_of(value)}")
    return [_message(message, f"message {number} in the column {column!r}") for number, message in enumerate(value, 1)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"{where} must be an object with role and content, found {kind_of(value)}")
    # Tables have every key in every message, empty where it does not apply.
    found = {name: part for name, part in value.items() if part is not None}
    role, content = found.get("role"), found.get("content")
    if role not in ROLES:
        raise RowError(f"{where} must have one of the roles {', '.join(ROLES)}, found {kind_of(role)}")
    if content is None and role == "assistant" and found.get("tool_calls"):
        return {**found, "content": ""}
    if not isinstance(content, str):
        raise RowError(f"the content of {where} must be text, found {kind_of(content)}")
    if not encodable(content) or _START in content or _END in content:
        raise RowError(f"the content of {where} holds what is no character")
    return found


def tools_of(value: Any, column: str) -> list[Any] | None:
    """A list of JSON schemas, or JSON text of one; None where there are none. Raises RowError."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(f"the column {column!r} must hold tools as a list or as JSON, found text") from None
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"the column {column!r} must hold a list of tools, found {kind_of(value)}")
    return list(value) or None


def ends_with_assistant(messages: Sequence[Message], column: str) -> None:
    """Raises RowError for a chat that has no answer to learn from."""
    if messages[-1]["role"] != "assistant":
        raise RowError(f"the messages in the column {column!r} must end with one of the assistant")
    if messages[0]["role"] == "assistant":
        raise RowError(f"the messages in the column {column!r} must not begin with one of the assistant")
    if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
        raise RowError(f"the last message in the column {column!r} is empty")
