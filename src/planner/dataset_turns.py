"""What training rows are made of: turns, conversations, pairs of answers; and how a record's turns are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn; `role` is system, user, assistant or tool."""

    role: str
    content: str


class RowError(Exception):
    """A row that breaks its format, in words for the user; the reader adds file and line.

    `kind` groups faults: "format", "empty" where a prompt, an answer or a text holds nothing, or "same" where both
    answers of a pair are one.
    """

    def __init__(self, message: str, kind: str = "format") -> None:
        self.kind = kind
        super().__init__(message)


Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two whole conversations that differ in their end, of which the first one is preferred.

    Both begin with the same `num_shared` turns, at least one, and end with an answer.
    """

    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]

    @property
    def num_shared(self) -> int:
        """Turns before the first difference: the prompt."""
        both = zip(self.chosen, self.rejected, strict=False)
        return next(i for i, (a, b) in enumerate((*both, (None, self))) if a != b)


Content = tuple[Message, ...] | str | Pair


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How the columns of one row make a conversation, a text or a pair of answers, and back; `parse` and `write` raise RowError.

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
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt"}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")


def parse_turns(record: Record, column: str) -> tuple[Message, ...]:
    """A conversation that a column holds as a list of turns."""
    turns = record[column]
    if not isinstance(turns, list):
        raise RowError(f"{column} must be a list of turns, not {kind_of(turns)}")
    messages = [parse_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    if not any(m.role == "assistant" for m in messages):
        raise RowError(f"no assistant turn in {column}, so there is nothing to learn; remove the row")
    return (*system_turn(record), *messages)


def parse_turn(turn: object, number: int) -> Message:
    """The turn with that number, in either spelling of its keys."""
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} is {kind_of(turn)}, not an object with role and content")
    role_name = next((turn[key] for key in _ROLE_KEYS if key in turn), None)
    role = _ROLES.get(role_name.lower()) if isinstance(role_name, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise RowError(f"turn {number} has the role {_short(role_name)}; known are {known}")
    content = next((turn[key] for key in _CONTENT_KEYS if key in turn), None)
    text = (
        _join_parts(content, number)
        if isinstance(content, list)
        else text_of(content, f"turn {number} ({role})")
    )
    if role == "assistant" and not text.strip():
        raise RowError(f"turn {number}, an answer, is empty; fill it or remove the row", "empty")
    return Message(role=role, content=text)


def _join_parts(parts: list[Any], number: int) -> str:
    """Content as a list of {"type": "text", "text": …}."""
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) != len(parts):
        raise RowError(f"turn {number} holds something other than text; only text can be trained")
    return "".join(text_of(text, f"turn {number}") for text in texts)


def system_turn(record: Record) -> tuple[Message, ...]:
    """The column `system` as a turn, where it says something."""
    text = text_of(record.get("system"), "system")
    return (Message(role="system", content=text),) if text.strip() else ()


def history_turns(record: Record) -> tuple[Message, ...]:
    """Earlier turns of an alpaca row, as [[question, answer], …]."""
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise RowError("history must be a list of [question, answer] pairs")
    turns = [
        Message(role=role, content=text_of(text, "history"))
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    if any(not turn.content.strip() for turn in turns):
        raise RowError("a turn in history is empty; fill it or remove the row", "empty")
    return tuple(turns)


def prompt_turns(
    record: Record, question: str, context: str | None = None, *, has_history: bool = False
) -> tuple[Message, ...]:
    """The turns before an answer: system, history where the format has it, and the question with its context."""
    prompt = text_of(record[question], question)
    extra = text_of(record.get(context), context) if context else ""
    user = "\n\n".join(part for part in (prompt, extra) if part.strip())
    if not user:
        raise RowError(f"the prompt ({question}) is empty; fill it or remove the row", "empty")
    history = history_turns(record) if has_history else ()
    return (*system_turn(record), *history, Message(role="user", content=user))


def answer_turn(value: object, column: str) -> Message:
    """An answer as the assistant's turn."""
    reply = text_of(value, column)
    if not reply.strip():
        raise RowError(f"the answer ({column}) is empty; fill it or remove the row", "empty")
    return Message(role="assistant", content=reply)


def text_of(value: object, what: str) -> str:
    """A text as it is; a missing one is empty. Lone surrogates are no text: nothing could encode them."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, not {kind_of(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(f"{what} holds half of a surrogate pair (\\ud800 … \\udfff); remove it") from None
    return value


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "…"


def conversation(content: Content) -> tuple[Message, ...]:
    """The turns of a content that is one conversation."""
    if isinstance(content, str):
        raise RowError("a plain text holds no turns; convert it to the format text only")
    if isinstance(content, Pair):
        raise RowError("a pair of answers needs a format that holds both, such as preference")
    return content


def write_turns(
    content: Content, column: str, role: str, text: str, roles: Mapping[str, str]
) -> dict[str, Any]:
    """A conversation as a list of turns in one column."""
    turns = conversation(content)
    return {column: [{role: roles.get(turn.role, turn.role), text: turn.content} for turn in turns]}


def write_pair(content: Content, question: str, answer: str, history: bool = False) -> dict[str, Any]:
    """A conversation as one question and its answer, earlier ones in `history` where the format has it."""
    turns = list(conversation(content))
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
