"""Rows as tokens, with a mark on each token that is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.chat_template import Rendered, TemplateError, render
from planner.dataset import Row, check_rows
from planner.errors import DataError, SetupError

_ROWS_AT_ONCE = 1000
"""The tokenizer works on this many rows in parallel."""


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One whole row: `ids` (int32) and `trained` (bool) have one length; `ends` are the places of trained end tokens.

    `method` says how the answers were found (`bench.chat_template`), "all" where every token trains. `rejected` is the
    other conversation of a pair; of both only what follows the shared turns trains.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    ends: tuple[int, ...]
    method: str
    has_control_tokens: bool
    cuts_thoughts: bool = False
    rejected: Document | None = None

    @property
    def sequences(self) -> tuple[Document, ...]:
        """The document, and a pair's other one."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def num_tokens(self) -> int:
        """Tokens; of a pair, of its longer conversation."""
        return max(len(sequence.ids) for sequence in self.sequences)


def documents(rows: Sequence[Row], tokenizer: Any, objective: str) -> Iterator[Document]:
    """The rows' documents in order, nothing cut off. Raises DataError with the line, SetupError for an objective
    whose data can't be read.
    """
    encode = _ENCODERS.get(objective)
    if encode is None:
        raise SetupError(
            "objective", f"training data for {objective} can't be read yet; {' and '.join(_ENCODERS)} can"
        )
    check_rows(rows, objective)
    facts = _TokenizerFacts.of(tokenizer)
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        yield from encode(rows[at : at + _ROWS_AT_ONCE], tokenizer, facts)


@dataclass(frozen=True, slots=True)
class _TokenizerFacts:
    """Ids that can end a turn, and how control tokens look in a text."""

    end_ids: frozenset[int]
    bos_id: int | None
    eos_id: int | None
    control: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any) -> _TokenizerFacts:
        if not tokenizer.is_fast:
            message = "is a slow tokenizer, which can't say where its tokens lie in the text; use one with tokenizer.json"
            raise DataError(str(tokenizer.name_or_path), message)
        special = {
            number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        eos = tokenizer.eos_token_id
        words = "|".join(re.escape(word) for word in special.values() if not word.isspace())
        return cls(
            end_ids=frozenset(special) | ({eos} if eos is not None else frozenset()),
            bos_id=tokenizer.bos_token_id,
            eos_id=eos,
            control=re.compile(words or r"(?!)"),
        )

    def has_control_tokens(self, row: Row) -> bool:
        texts = [message.content for message in row.messages or ()] + [row.text or ""]
        return any(self.control.search(text) for text in texts)


def _encode_answers(rows: Sequence[Row], tokenizer: Any, facts: _TokenizerFacts) -> Iterator[Document]:
    """Objective sft: all assistant turns train."""
    return _encode_chats(rows, [_render(tokenizer, row) for row in rows], tokenizer, facts)


def _encode_chats(
    rows: Sequence[Row], chats: Sequence[Rendered], tokenizer: Any, facts: _TokenizerFacts
) -> Iterator[Document]:
    encoded = _tokenize_chats(tokenizer, [chat.text for chat in chats], offsets=True)
    for row, chat, ids, offsets in zip(
        rows, chats, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        trained, ends = _mark_answers(chat, ids, np.array(offsets, dtype=np.int64).reshape(-1, 2), facts)
        if len(trained) > len(ids):
            ids = [*ids, facts.eos_id]
        yield Document(
            ids=np.array(ids, dtype=np.int32),
            trained=trained,
            ends=ends,
            method=chat.method,
            has_control_tokens=facts.has_control_tokens(row),
            cuts_thoughts=chat.cuts_thoughts,
        )


def _encode_everything(rows: Sequence[Row], tokenizer: Any, facts: _TokenizerFacts) -> Iterator[Document]:
    """Objective pretrain: all tokens train. A text gets what the tokenizer puts around texts, and an end token."""
    texts = [row.text for row in rows if row.text is not None]
    chats = [_render(tokenizer, row).text for row in rows if row.text is None]
    text_ids = iter(
        tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []
    )
    chat_ids = iter(_tokenize_chats(tokenizer, chats)["input_ids"] if chats else [])
    for row in rows:
        ids = next(chat_ids) if row.text is None else _close(next(text_ids), facts)
        trained = np.ones(len(ids), dtype=np.bool_)
        yield Document(np.array(ids, dtype=np.int32), trained, (), "all", facts.has_control_tokens(row))


def _encode_pairs(rows: Sequence[Row], tokenizer: Any, facts: _TokenizerFacts) -> Iterator[Document]:
    """Objective dpo: the answers train that follow the turns which both conversations share."""
    sides = []
    for side in (0, 1):
        own = [row.sequences[side] for row in rows]
        chats = [_last_answers(_render(tokenizer, row), pair) for row, pair in zip(own, rows, strict=True)]
        sides.append(_encode_chats(own, chats, tokenizer, facts))
    for chosen, rejected in zip(*sides, strict=True):
        yield replace(
            chosen,
            has_control_tokens=chosen.has_control_tokens or rejected.has_control_tokens,
            cuts_thoughts=chosen.cuts_thoughts or rejected.cuts_thoughts,
            rejected=rejected,
        )


def _last_answers(chat: Rendered, pair: Row) -> Rendered:
    """A conversation of a pair with the answers that the other one doesn't share."""
    num_shared = pair.num_shared_answers
    return replace(chat, answers=chat.answers[num_shared:])


_ENCODERS = {"sft": _encode_answers, "pretrain": _encode_everything, "dpo": _encode_pairs}


def _render(tokenizer: Any, row: Row) -> Rendered:
    if row.messages is None:
        raise DataError(
            row.path, "plain texts hold no answers to train on; set objective to pretrain", row.line
        )
    try:
        return render(tokenizer, row.messages)
    except TemplateError as error:
        raise DataError(row.path, str(error), row.line) from error


def _tokenize_chats(tokenizer: Any, texts: list[str], offsets: bool = False) -> Any:
    """The template wrote every special token itself: adding more would double the first."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def _close(ids: list[int], facts: _TokenizerFacts) -> list[int]:
    """One BOS where the text brought its own besides the tokenizer's, and an end token."""
    if facts.bos_id is not None and ids[:2] == [facts.bos_id] * 2:
        ids = ids[1:]
    return ids if facts.eos_id is None or ids[-1:] == [facts.eos_id] else [*ids, facts.eos_id]


def _mark_answers(
    chat: Rendered, ids: list[int], offsets: npt.NDArray[np.int64], facts: _TokenizerFacts
) -> tuple[npt.NDArray[np.bool_], tuple[int, ...]]:
    """(trained, places of the trained end tokens); one longer than `ids` where an end token must be appended.

    A token that is partly answer trains. The end token of a turn is the next control token, if only blanks come
    before it; where the template writes none after the last answer, the tokenizer's own is appended.
    """
    trained = np.zeros(len(ids) + 1, dtype=np.bool_)
    ends: list[int] = []
    blank = [not chat.text[start:end].strip() for start, end in offsets.tolist()]
    for start, end in chat.answers:
        inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
        if not inside.size:
            continue
        first, last = int(inside[0]), int(inside[-1])
        stop = _end_place(ids, blank, first, last, facts)
        trained[first : (last if stop is None else stop) + 1] = True
        if stop is not None:
            trained[stop + 1 : last + 1] = False
            ends.append(stop)
    return (trained if ends and ends[-1] == len(ids) else trained[:-1]), tuple(ends)


def _end_place(
    ids: list[int], blank: list[bool], first: int, last: int, facts: _TokenizerFacts
) -> int | None:
    """Where the turn's end token is, len(ids) where it must be appended, None where the turn has none."""
    inner = last
    while inner > first and blank[inner]:
        inner -= 1
    if ids[inner] in facts.end_ids:
        return _through_eos(ids, inner, facts)
    outer = last + 1
    while outer < len(ids) and blank[outer]:
        outer += 1
    if outer == len(ids):
        return None if facts.eos_id is None else outer
    return _through_eos(ids, outer, facts) if ids[outer] in facts.end_ids else None


def _through_eos(ids: list[int], at: int, facts: _TokenizerFacts) -> int:
    """The tokenizer's own end token where it ends the run of control tokens that begins at `at`, else `at`."""
    end = at
    while end < len(ids) and ids[end] in facts.end_ids:
        if ids[end] == facts.eos_id:
            return end
        end += 1
    return at
