"""What the columns of a training row mean. Adding a format is one entry in FORMATS.

A format turns one record into the turns of a conversation or into one plain text; it never changes the
words, except that an alpaca row's instruction and input become one user turn with a blank line between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn; `role` is system, user, assistant or tool."""

    role: str
    content: str


class RowError(Exception):
    """A row that breaks its format, in words for the user; the reader adds file and line.

    `kind` groups faults: "format", or "empty" where a prompt, an answer or a text holds nothing.
    """

    def __init__(self, message: str, kind: str = "format") -> None:
        self.kind = kind
        super().__init__(message)


Record = Mapping[str, Any]
Content = tuple[Message, ...] | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How the columns of one row make a conversation or a text, and back; `parse` and `write` raise RowError.

    A content that `write` can't put into this format's columns without loss is an error.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    parse: Callable[[Record], Content]
    write: Callable[[Content], dict[str, Any]]

    def matches(self, record: Record) -> bool:
        """Whether the record has all columns that this format needs."""
        return all(column in record for column in self.required)


_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")


def detect(record: Record) -> Format | None:
    """The first format whose columns the record has."""
    return next((f for f in FORMATS if f.matches(record)), None)


def accepted_columns() -> str:
    """The formats in words, for messages."""
    return " | ".join(" + ".join(f.required) for f in FORMATS)


def _parse_turns(record: Record, column: str) -> Content:
    turns = record[column]
    if not isinstance(turns, list):
        raise RowError(f"{column} must be a list of turns, not {_kind(turns)}")
    messages = [_parse_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    if not any(m.role == "assistant" for m in messages):
        raise RowError(f"no assistant turn in {column}, so there is nothing to learn; remove the row")
    return (*_system(record), *messages)


def _parse_turn(turn: object, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} is {_kind(turn)}, not an object with role and content")
    role_name = next((turn[key] for key in _ROLE_KEYS if key in turn), None)
    role = _ROLES.get(role_name.lower()) if isinstance(role_name, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise RowError(f"turn {number} has the role {_short(role_name)}; known are {known}")
    content = next((turn[key] for key in _CONTENT_KEYS if key in turn), None)
    text = (
        _join_parts(content, number)
        if isinstance(content, list)
        else _text(content, f"turn {number} ({role})")
    )
    if role == "assistant" and not text.strip():
        raise RowError(f"turn {number}, an answer, is empty; fill it or remove the row", "empty")
    return Message(role=role, content=text)


def _join_parts(parts: list[Any], number: int) -> str:
    """Content as a list of {"type": "text", "text": …}."""
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) != len(parts):
        raise RowError(f"turn {number} holds something other than text; only text can be trained")
    return "".join(_text(text, f"turn {number}") for text in texts)


def _parse_pair(record: Record, question: str, answer: str, context: str | None = None) -> Content:
    prompt = _text(record[question], question)
    extra = _text(record.get(context), context) if context else ""
    user = "\n\n".join(part for part in (prompt, extra) if part.strip())
    if not user:
        raise RowError(f"the prompt ({question}) is empty; fill it or remove the row", "empty")
    reply = _text(record[answer], answer)
    if not reply.strip():
        raise RowError(f"the answer ({answer}) is empty; fill it or remove the row", "empty")
    history = _history(record) if context == "input" else ()
    turns = (Message(role="user", content=user), Message(role="assistant", content=reply))
    return (*_system(record), *history, *turns)


def _parse_text(record: Record, column: str) -> Content:
    text = _text(record[column], column)
    if not text.strip():
        raise RowError(f"{column} is empty; fill it or remove the row", "empty")
    return text


def _system(record: Record) -> tuple[Message, ...]:
    text = _text(record.get("system"), "system")
    return (Message(role="system", content=text),) if text.strip() else ()


def _history(record: Record) -> tuple[Message, ...]:
    """Earlier turns of an alpaca row, as [[question, answer], …]."""
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise RowError("history must be a list of [question, answer] pairs")
    turns = [
        Message(role=role, content=_text(text, "history"))
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    if any(not turn.content.strip() for turn in turns):
        raise RowError("a turn in history is empty; fill it or remove the row", "empty")
    return tuple(turns)


def _text(value: object, what: str) -> str:
    """A text as it is; a missing one is empty. Lone surrogates are no text: nothing could encode them."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, not {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(f"{what} holds half of a surrogate pair (\\ud800 … \\udfff); remove it") from None
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _conversation(content: Content) -> tuple[Message, ...]:
    if isinstance(content, str):
        raise RowError("a plain text holds no turns; convert it to the format text only")
    return content


def _write_turns(
    content: Content, column: str, role: str, text: str, roles: Mapping[str, str]
) -> dict[str, Any]:
    turns = _conversation(content)
    return {column: [{role: roles.get(turn.role, turn.role), text: turn.content} for turn in turns]}


def _write_pair(content: Content, question: str, answer: str, history: bool = False) -> dict[str, Any]:
    turns = list(_conversation(content))
    record = {"system": turns.pop(0).content} if turns[0].role == "system" else {}
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    if len(turns) % 2 or any((q.role, a.role) != ("user", "assistant") for q, a in pairs):
        raise RowError(
            "turns that don't alternate between user and assistant need the format messages or sharegpt"
        )
    if len(pairs) > 1 and not history:
        raise RowError(f"{len(pairs)} questions in one row need the format messages, sharegpt or alpaca")
    *earlier, (asked, answered) = pairs
    record |= {question: asked.content, answer: answered.content}
    return record | ({"history": [[q.content, a.content] for q, a in earlier]} if earlier else {})


def _write_text(content: Content) -> dict[str, Any]:
    if not isinstance(content, str):
        raise RowError("a conversation becomes a text only through a chat template; keep its turns")
    return {"text": content}


_SHAREGPT_ROLES = {"user": "human", "assistant": "gpt"}

FORMATS: tuple[Format, ...] = (
    Format(
        name="messages",
        required=("messages",),
        optional=("system",),
        parse=partial(_parse_turns, column="messages"),
        write=partial(_write_turns, column="messages", role="role", text="content", roles={}),
    ),
    Format(
        name="sharegpt",
        required=("conversations",),
        optional=("system",),
        parse=partial(_parse_turns, column="conversations"),
        write=partial(_write_turns, column="conversations", role="from", text="value", roles=_SHAREGPT_ROLES),
    ),
    Format(
        name="alpaca",
        required=("instruction", "output"),
        optional=("input", "system", "history"),
        parse=partial(_parse_pair, question="instruction", answer="output", context="input"),
        write=partial(_write_pair, question="instruction", answer="output", history=True),
    ),
    Format(
        name="dolly",
        required=("instruction", "response"),
        optional=("context", "system"),
        parse=partial(_parse_pair, question="instruction", answer="response", context="context"),
        write=partial(_write_pair, question="instruction", answer="response"),
    ),
    Format(
        name="prompt-completion",
        required=("prompt", "completion"),
        optional=("system",),
        parse=partial(_parse_pair, question="prompt", answer="completion"),
        write=partial(_write_pair, question="prompt", answer="completion"),
    ),
    Format(
        name="prompt-response",
        required=("prompt", "response"),
        optional=("system",),
        parse=partial(_parse_pair, question="prompt", answer="response"),
        write=partial(_write_pair, question="prompt", answer="response"),
    ),
    Format(
        name="question-answer",
        required=("question", "answer"),
        optional=("system",),
        parse=partial(_parse_pair, question="question", answer="answer"),
        write=partial(_write_pair, question="question", answer="answer"),
    ),
    Format(name="text", required=("text",), parse=partial(_parse_text, column="text"), write=_write_text),
)
"""Tried in this order; columns that a format doesn't name are ignored and reported."""
