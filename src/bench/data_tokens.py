"""What a training run's tokenizer, template and seq_len make of rows, counted as they pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.data import cut, is_cut, num_kept_tokens, num_lost_answer_tokens
from bench.data_audit import (
    ANSWERED,
    Finding,
    TokenAudit,
    embedding_rows,
    find_foreign_tokens,
    find_unlike_serving,
)
from bench.data_report import TokenReport, lengths_of
from bench.encode import Document, documents
from planner.dataset import Row
from planner.errors import DataError
from planner.setup import PAIRED, TrainSetup

_BATCH_ROWS = 500


def fitting(setup: TrainSetup, row: Row) -> TrainSetup:
    """The setup as it can train the row: what has two answers is a pair for DPO, whatever else is asked for."""
    is_foreign = row.rejected is not None and setup.objective not in PAIRED
    return setup.with_(objective=PAIRED[0], packing=False) if is_foreign else setup


@dataclass(kw_only=True)
class TokenLook:
    """Rows through the tokenizer, some at a time; `of` gives None where there is no setup or no tokenizer."""

    setup: TrainSetup
    tokenizer: Any
    audit: TokenAudit
    template: str = "none"
    waiting: list[Row] = field(default_factory=list)
    serving: Finding | None = None
    refused: Finding | None = None
    num_refused_rows: int = 0
    num_truncated_rows: int = 0
    num_truncated_pairs: int = 0
    num_answer_tokens: int = 0
    num_lost_answer_tokens: int = 0
    num_control_token_rows: int = 0
    num_cut_thought_rows: int = 0

    @classmethod
    def of(cls, setup: TrainSetup | None, tokenizer: Any) -> TokenLook | None:
        """A look with the setup's objective and seq_len."""
        if setup is None or tokenizer is None:
            return None
        audit = TokenAudit(seq_len=setup.seq_len, objective=setup.objective, bos_id=tokenizer.bos_token_id)
        return cls(setup=setup, tokenizer=tokenizer, audit=audit)

    def add(self, row: Row) -> None:
        """Take a row in."""
        self.setup = fitting(self.setup, row)
        self.audit.objective = self.setup.objective
        self.waiting.append(row)
        if len(self.waiting) >= _BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Tokenise what waits."""
        rows, self.waiting = self.waiting, []
        if self.setup.objective in ANSWERED and self.serving is None and not self.audit.lengths:
            self.serving = find_unlike_serving(rows, self.tokenizer)
        if any(row.messages for row in rows):
            from bench.chat_template import ensure_template

            self.template = ensure_template(self.tokenizer)
        for row, document in self._documents(rows):
            self._look_at(row, document)

    def _documents(self, rows: list[Row]) -> list[tuple[Row, Document]]:
        """All at once is faster; one that the template refuses must not hide the others."""
        try:
            return list(zip(rows, documents(rows, self.tokenizer, self.setup.objective), strict=True))
        except DataError as error:
            if len(rows) > 1:
                middle = len(rows) // 2
                return self._documents(rows[:middle]) + self._documents(rows[middle:])
            [row] = rows
            message = str(error).removeprefix(f"{row.path}:{row.line}: ")
            self.num_refused_rows += 1
            self.refused = self.refused or Finding(
                audit="template", message=message, path=row.path, line=row.line
            )
            return []

    def _look_at(self, row: Row, document: Document) -> None:
        pieces = cut(document, self.setup.seq_len, self.setup.objective)
        kept = num_kept_tokens(document, pieces)
        are_cut = is_cut(document, kept)
        self.audit.add(row, document, trains=bool(pieces))
        self.num_truncated_rows += any(are_cut)
        self.num_truncated_pairs += row.rejected is not None and all(are_cut)
        self.num_answer_tokens += sum(int(sequence.trained.sum()) for sequence in document.sequences)
        self.num_lost_answer_tokens += num_lost_answer_tokens(document, kept)
        self.num_control_token_rows += document.has_control_tokens
        self.num_cut_thought_rows += document.cuts_thoughts

    def findings(self) -> Iterator[Finding]:
        """All that would stop a run."""
        found = (
            find_foreign_tokens(self.tokenizer, embedding_rows(self.setup)),
            self.refused,
            self.serving,
            *self.audit.findings(),
        )
        return (finding for finding in found if finding is not None)

    def report(self) -> TokenReport | None:
        """The counts; None where no row could be tokenised."""
        lengths = lengths_of("tokens", self.audit.lengths)
        if lengths is None:
            return None
        return TokenReport(
            seq_len=self.setup.seq_len,
            lengths=lengths,
            num_refused_rows=self.num_refused_rows,
            num_truncated_rows=self.num_truncated_rows,
            num_truncated_pairs=self.num_truncated_pairs,
            num_answer_tokens=self.num_answer_tokens,
            num_lost_answer_tokens=self.num_lost_answer_tokens,
            num_untrained_rows=self.audit.num_untrained_rows,
            num_control_token_rows=self.num_control_token_rows,
            num_cut_thought_rows=self.num_cut_thought_rows,
            template=self.template,
        )
