"""Rows with two answers of which one is preferred: what DPO (Rafailov et al. 2023, arXiv:2305.18290) trains on.

The names of columns are those of TRL's preference data (prompt, chosen, rejected; or two whole conversations), of
LLaMA-Factory's alpaca and sharegpt files, of ms-swift, and of the Chinese sets that say response_chosen. Only what
stands behind the turns that both conversations share is an answer. Adding a format is one entry in PREFERENCES.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from planner.dataset_turns import (
    SHAREGPT_ROLES,
    Content,
    Format,
    Message,
    Pair,
    Record,
    RowError,
    answer_turn,
    kind_of,
    parse_turn,
    parse_turns,
    prompt_turns,
    system_turn,
    write_pair,
    write_turns,
)

Turns = tuple[Message, ...]


def _parse_answers(
    record: Record,
    *,
    prompt: str | None,
    chosen: str = "chosen",
    rejected: str = "rejected",
    context: str | None = None,
) -> Content:
    """A prompt as text or as turns, or none where each answer is a whole conversation."""
    before = () if prompt is None else _prompt(record, prompt, context)
    return _pair(*(_with_answer(before, record[column], column) for column in (chosen, rejected)))


def _prompt(record: Record, column: str, context: str | None) -> Turns:
    value = record[column]
    if not isinstance(value, list):
        return prompt_turns(record, column, context, has_history=True)
    return (*system_turn(record), *(parse_turn(turn, number) for number, turn in enumerate(value, start=1)))


def _with_answer(before: Turns, value: object, column: str) -> Turns:
    """The whole conversation with an answer: a text, one turn, or turns that may repeat what is before it."""
    if isinstance(value, Mapping):
        return (*before, parse_turn(value, 1))
    if isinstance(value, list):
        turns = tuple(parse_turn(turn, number) for number, turn in enumerate(value, start=1))
        if turns and turns[0].role == "assistant":
            return (*before, *turns)
        if before and before[-1] not in turns:
            raise RowError(f"{column} is a conversation that doesn't hold the prompt")
        return turns
    if not before:
        raise RowError(
            f"{column} must be a list of turns, not {kind_of(value)}; name the prompt in a column prompt"
        )
    return (*before, answer_turn(value, column))


def _parse_rejected_response(record: Record) -> Content:
    """A conversation whose last answer is the chosen one."""
    chosen = parse_turns(record, "messages")
    return _pair(chosen, (*chosen[:-1], answer_turn(record["rejected_response"], "rejected_response")))


def _pair(chosen: Turns, rejected: Turns) -> Pair:
    """Both conversations, checked."""
    if chosen == rejected:
        raise RowError("chosen and rejected are the same answer: there is nothing to prefer", "same")
    if not all(turns and turns[-1].role == "assistant" for turns in (chosen, rejected)):
        raise RowError("chosen and rejected must both end with an answer of the assistant")
    pair = Pair(chosen=chosen, rejected=rejected)
    if not any(turn.role != "system" for turn in chosen[: pair.num_shared]):
        raise RowError("chosen and rejected don't begin with the same prompt")
    if min(len(chosen), len(rejected)) == pair.num_shared:
        raise RowError(
            "one answer is the beginning of the other conversation; give both the same number of turns"
        )
    return pair


def _both(content: Content) -> Pair:
    if not isinstance(content, Pair):
        raise RowError("it has one answer; a pair needs a chosen and a rejected one")
    return content


def _write_conversations(content: Content) -> dict[str, Any]:
    pair = _both(content)
    return {
        **write_turns(pair.chosen, "chosen", "role", "content", {}),
        **write_turns(pair.rejected, "rejected", "role", "content", {}),
    }


def _last_turns(content: Content) -> tuple[Pair, Message, Message]:
    """The pair and its answers, where these are one turn each."""
    pair = _both(content)
    if any(len(turns) != pair.num_shared + 1 for turns in (pair.chosen, pair.rejected)):
        raise RowError("answers of several turns need the format preference")
    return pair, pair.chosen[-1], pair.rejected[-1]


def _write_answers(
    content: Content, *, prompt: str, chosen: str = "chosen", rejected: str = "rejected"
) -> dict[str, Any]:
    pair, _, lost = _last_turns(content)
    return {**write_pair(pair.chosen, prompt, chosen, history=True), rejected: lost.content}


def _write_sharegpt(content: Content) -> dict[str, Any]:
    pair, won, lost = _last_turns(content)
    answers = (("chosen", won), ("rejected", lost))
    record = write_turns(pair.chosen[:-1], "conversations", "from", "value", SHAREGPT_ROLES)
    return record | {name: {"from": "gpt", "value": turn.content} for name, turn in answers}


def _write_rejected_response(content: Content) -> dict[str, Any]:
    pair, _, lost = _last_turns(content)
    record = write_turns(pair.chosen, "messages", "role", "content", {})
    return record | {"rejected_response": lost.content}


PREFERENCES: tuple[Format, ...] = (
    Format(
        name="prompt-preference",
        required=("prompt", "chosen", "rejected"),
        optional=("system", "history"),
        parse=partial(_parse_answers, prompt="prompt"),
        write=partial(_write_answers, prompt="prompt"),
    ),
    Format(
        name="alpaca-preference",
        required=("instruction", "chosen", "rejected"),
        optional=("input", "system", "history"),
        parse=partial(_parse_answers, prompt="instruction", context="input"),
        write=partial(_write_answers, prompt="instruction"),
    ),
    Format(
        name="sharegpt-preference",
        required=("conversations", "chosen", "rejected"),
        optional=("system",),
        parse=partial(_parse_answers, prompt="conversations"),
        write=_write_sharegpt,
    ),
    Format(
        name="question-preference",
        required=("question", "chosen", "rejected"),
        optional=("system", "history"),
        parse=partial(_parse_answers, prompt="question"),
        write=partial(_write_answers, prompt="question"),
    ),
    Format(
        name="question-response-preference",
        required=("question", "response_chosen", "response_rejected"),
        optional=("system", "history"),
        parse=partial(
            _parse_answers, prompt="question", chosen="response_chosen", rejected="response_rejected"
        ),
        write=partial(
            _write_answers, prompt="question", chosen="response_chosen", rejected="response_rejected"
        ),
    ),
    Format(
        name="messages-preference",
        required=("messages", "rejected_response"),
        optional=("system",),
        parse=_parse_rejected_response,
        write=_write_rejected_response,
    ),
    Format(
        name="preference",
        required=("chosen", "rejected"),
        parse=partial(_parse_answers, prompt=None),
        write=_write_conversations,
    ),
)
"""Before all other formats: a row with two answers may have the columns of one with one."""
