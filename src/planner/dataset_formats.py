"""What the columns of a training row mean. Adding a format is one entry in FORMATS.

A format turns one record into the turns of a conversation or into one plain text; it never changes the
words, except that an alpaca row's instruction and input become one user turn with a blank line between.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from planner.dataset_preferences import PREFERENCES
from planner.dataset_turns import (
    SHAREGPT_ROLES,
    Content,
    Format,
    Record,
    RowError,
    answer_turn,
    parse_turns,
    prompt_turns,
    text_of,
    write_pair,
    write_turns,
)


def detect(record: Record) -> Format | None:
    """The first format whose columns the record has."""
    return next((f for f in FORMATS if f.matches(record)), None)


def accepted_columns() -> str:
    """The formats in words, for messages."""
    ranked = sorted(FORMATS, key=lambda f: f in PREFERENCES)
    return " | ".join(" + ".join(f.required) for f in ranked)


def _parse_pair(record: Record, question: str, answer: str, context: str | None = None) -> Content:
    turns = prompt_turns(record, question, context, has_history=context == "input")
    return (*turns, answer_turn(record[answer], answer))


def _parse_text(record: Record, column: str) -> Content:
    text = text_of(record[column], column)
    if not text.strip():
        raise RowError(f"{column} is empty; fill it or remove the row", "empty")
    return text


def _write_text(content: Content) -> dict[str, Any]:
    if not isinstance(content, str):
        raise RowError("a conversation becomes a text only through a chat template; keep its turns")
    return {"text": content}


FORMATS: tuple[Format, ...] = (
    *PREFERENCES,
    Format(
        name="messages",
        required=("messages",),
        optional=("system",),
        parse=partial(parse_turns, column="messages"),
        write=partial(write_turns, column="messages", role="role", text="content", roles={}),
    ),
    Format(
        name="sharegpt",
        required=("conversations",),
        optional=("system",),
        parse=partial(parse_turns, column="conversations"),
        write=partial(write_turns, column="conversations", role="from", text="value", roles=SHAREGPT_ROLES),
    ),
    Format(
        name="alpaca",
        required=("instruction", "output"),
        optional=("input", "system", "history"),
        parse=partial(_parse_pair, question="instruction", answer="output", context="input"),
        write=partial(write_pair, question="instruction", answer="output", history=True),
    ),
    Format(
        name="dolly",
        required=("instruction", "response"),
        optional=("context", "system"),
        parse=partial(_parse_pair, question="instruction", answer="response", context="context"),
        write=partial(write_pair, question="instruction", answer="response"),
    ),
    Format(
        name="prompt-completion",
        required=("prompt", "completion"),
        optional=("system",),
        parse=partial(_parse_pair, question="prompt", answer="completion"),
        write=partial(write_pair, question="prompt", answer="completion"),
    ),
    Format(
        name="prompt-response",
        required=("prompt", "response"),
        optional=("system",),
        parse=partial(_parse_pair, question="prompt", answer="response"),
        write=partial(write_pair, question="prompt", answer="response"),
    ),
    Format(
        name="question-answer",
        required=("question", "answer"),
        optional=("system",),
        parse=partial(_parse_pair, question="question", answer="answer"),
        write=partial(write_pair, question="question", answer="answer"),
    ),
    Format(name="text", required=("text",), parse=partial(_parse_text, column="text"), write=_write_text),
)
"""Tried in this order; columns that a format doesn't name are ignored and reported."""
