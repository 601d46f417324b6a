"""What must be right before a minute is spent on training: labels, end tokens, beginnings, templates, vocabulary.

One set of rules for `finefit train`, which stops at the first finding, and `finefit data inspect`, which shows all.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from bench.chat_template import TemplateError, render, render_text
from planner.dataset import Row, nearest_rank
from planner.errors import DataError, FinefitError
from planner.setup import TrainSetup

if TYPE_CHECKING:
    from bench.data import Example
    from bench.encode import Document

MAX_UNTRAINED_SHARE = 0.01
"""More rows than this without anything to learn are a mistake in the settings, not in the rows."""
SERVED_ROWS = 50
"""A template is compared with what serving sends on this many rows: it writes all rows by the same rules."""
_SERVING_MODES: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})
"""What servers let their users choose of a template; one that knows no thinking ignores it."""
_SHOWN_CHARS = 40
ANSWERED = ("sft", "dpo")
"""Objectives that train answers, whose template and end tokens matter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One fault that makes training wrong without making it fail; `audit` names the rule."""

    audit: str
    message: str
    path: str
    line: int | None = None

    def as_error(self) -> DataError:
        """The finding as the error that stops a run."""
        return DataError(self.path, self.message, self.line)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class TokenAudit:
    """What the rows' tokens say, gathered row by row in bounded memory (4 bytes a row).

    `lengths` are the rows' tokens before any truncation, a pair's those of its longer conversation. A row is untrained when no token of it trains within
    `seq_len`, and doubled when it begins with two BOS tokens.
    """

    def __init__(self, *, seq_len: int, objective: str, bos_id: int | None) -> None:
        self.seq_len, self.objective, self.bos_id = seq_len, objective, bos_id
        self.lengths = array("I")
        self.num_untrained_rows = self.num_doubled_rows = 0
        self.has_ends = self.has_trained_ends = False
        self._first = self._untrained = self._doubled = ("data", 0)

    def add(self, row: Row, document: Document, *, trains: bool) -> None:
        """Take one row in; `trains`: whether a token of it trains within seq_len."""
        place = (row.path, row.line)
        self._first = self._first if self.lengths else place
        self.lengths.append(document.num_tokens)
        ends = [end for sequence in document.sequences for end in sequence.ends]
        self.has_ends |= bool(ends)
        self.has_trained_ends |= any(end < self.seq_len for end in ends)
        if not trains:
            self._untrained = self._untrained if self.num_untrained_rows else place
            self.num_untrained_rows += 1
        if self.bos_id is not None and document.ids[:2].tolist() == [self.bos_id] * 2:
            self._doubled = self._doubled if self.num_doubled_rows else place
            self.num_doubled_rows += 1

    def findings(self) -> list[Finding]:
        """All rules that the rows break, the most basic first."""
        found = (self._find_untrained(), self._find_endless(), self._find_doubled())
        return [finding for finding in found if finding is not None]

    def _find_untrained(self) -> Finding | None:
        num_rows = len(self.lengths)
        if self.num_untrained_rows <= MAX_UNTRAINED_SHARE * num_rows:
            return None
        p99 = nearest_rank(sorted(self.lengths), 0.99)
        message = (
            f"{self.num_untrained_rows} of {num_rows} rows have nothing to train within seq_len {self.seq_len} "
            f"(this is the first); raise seq_len: 99 % of the rows have at most {p99} tokens"
        )
        return _finding("untrained-rows", message, self._untrained)

    def _find_endless(self) -> Finding | None:
        if self.objective not in ANSWERED or self.has_trained_ends or not self.lengths:
            return None
        reason = "the chat template never ends an answer and the tokenizer has no end token"
        if self.has_ends:
            reason = f"every answer is longer than seq_len {self.seq_len}, so that its end is cut off"
        message = f"the model would never learn to stop: {reason}"
        return Finding(audit="end-of-turn", message=message, path=self._first[0])

    def _find_doubled(self) -> Finding | None:
        if not self.num_doubled_rows:
            return None
        message = (
            f"{self.num_doubled_rows} of {len(self.lengths)} rows begin with two BOS tokens (this is the first), as "
            "no prompt does that a server sends; write the token once in the chat template, and in no row"
        )
        return _finding("double-bos", message, self._doubled)


def _finding(audit: str, message: str, place: tuple[str, int]) -> Finding:
    return Finding(audit=audit, message=message, path=place[0], line=place[1])


def find_unlike_serving(rows: Iterable[Row], tokenizer: Any) -> Finding | None:
    """The first row whose words before its last answer are not what a server would send for them.

    A server writes the turns before the answer and the template's generation prompt, with or without thinking where
    the template knows `enable_thinking`. Blanks at the border don't count: they may be part of the answer's first
    token. Earlier answers may stand otherwise: templates cut their thoughts. Plain texts say nothing.
    """
    for row in islice((row for row in rows if row.messages), SERVED_ROWS):
        seen = _seen_and_served(row, tokenizer)
        if seen is not None and not any(map(seen.agrees, seen.prompts)):
            message = (
                "the template of training is not that of serving: before the answer the row holds "
                f"{_tail(seen.before)}, but a server sends {_tail(seen.prompts[0])}; let the generation prompt of the "
                "tokenizer's chat template write what the template writes before an answer, or the rows begin as it does"
            )
            return _finding("serving-template", message, (row.path, row.line))
    return None


@dataclass(frozen=True, slots=True)
class _Seen:
    """A row as trained (`text`; `before` its last answer) and the prompts that servers may send for it.

    `bare` is the prompt without the generation prompt.
    """

    text: str
    before: str
    bare: str
    prompts: tuple[str, ...]

    def agrees(self, prompt: str) -> bool:
        """Whether this is what comes before the answer, or begins it: then the rest is written by the model."""
        if prompt.rstrip() == self.before.rstrip():
            return True
        return prompt != self.bare and self.text.startswith(prompt.rstrip())


def _seen_and_served(row: Row, tokenizer: Any) -> _Seen | None:
    """None where the row doesn't tell."""
    assert row.messages is not None
    turns = [{"role": m.role, "content": m.content} for m in row.messages]
    asked = turns[: max(number for number, turn in enumerate(turns) if turn["role"] == "assistant")]
    if not asked:
        return None
    try:
        rendered = render(tokenizer, row.messages)
        prompts = tuple(
            render_text(tokenizer, asked, add_generation_prompt=True, **mode) for mode in _SERVING_MODES
        )
        bare = render_text(tokenizer, asked)
    except TemplateError:
        return None
    if not rendered.answers:
        return None
    return _Seen(rendered.text, rendered.text[: rendered.answers[-1][0]], bare, prompts)


def _tail(text: str) -> str:
    return ascii(text[-_SHOWN_CHARS:])


def find_foreign_tokens(tokenizer: Any, embedding_rows: int | None) -> Finding | None:
    """Whether the tokenizer has ids that the embedding has no row for; None rows are unknown and say nothing."""
    largest = max(tokenizer.get_vocab().values())
    if embedding_rows is None or largest < embedding_rows:
        return None
    message = f"its largest id is {largest}, but the embedding has {embedding_rows} rows; use the model's own tokenizer"
    name = str(getattr(tokenizer, "name_or_path", "") or "tokenizer")
    return Finding(audit="vocabulary", message=message, path=name)


def embedding_rows(setup: TrainSetup) -> int | None:
    """Rows of the model's embedding by its config; None where finefit can't read one."""
    from planner.resolve import resolve_model

    try:
        return resolve_model(setup.model, revision=setup.revision).vocab_size
    except FinefitError:
        return None


def find_lost_labels(rows: Sequence[Sequence[Example]], batch: Any) -> Finding | None:
    """Whether the batch trains fewer or other tokens than its rows say, as where padding is told by its id and the pad
    token is the end token: then no answer's end would train.
    """
    from bench.batching import sequences
    from bench.data import IGNORE_INDEX

    expected = [
        int(n) for row in sequences(rows) for example in row for n in example.labels if n != IGNORE_INDEX
    ]
    labels = batch["labels"]
    if labels[labels != IGNORE_INDEX].tolist() == expected:
        return None
    message = (
        f"a batch trains {int((labels != IGNORE_INDEX).sum())} tokens where its rows have {len(expected)}: padding "
        "has swallowed labels, such as those of an end token that is also the pad token"
    )
    return Finding(audit="pad-is-eos", message=message, path="data")


def stop_at(finding: Finding | None) -> None:
    """Raise the finding as a DataError where there is one."""
    if finding is not None:
        raise finding.as_error()
