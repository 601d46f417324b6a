"""The first rows of a file with their trained tokens marked."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from bench.chat_template import ensure_template
from bench.data import extra_readers
from bench.data_inspect import find_tokenizer
from bench.data_personal import redact
from bench.data_text import format_mask
from bench.data_tokens import fitting
from bench.encode import documents
from planner.dataset import Row, Source
from planner.errors import FinefitError
from planner.setup import TrainSetup


def first_masks(path: Path, setup: TrainSetup, *, num_rows: int, hide_personal: bool = False) -> list[str]:
    """The first `num_rows` rows as text, of a pair both conversations. Raises FinefitError where there is no tokenizer, DataError for a row that
    the template refuses.
    """
    tokenizer, notes = find_tokenizer(setup)
    if tokenizer is None:
        reason = notes[0].partition(": ")[2]
        raise FinefitError(
            f"--show-mask needs the tokenizer ({reason}); name a local folder with --tokenizer"
        )
    ensure_template(tokenizer)
    items = Source(path, extra_readers()).rows_and_faults()
    rows = list(islice((item for item in items if isinstance(item, Row)), num_rows))
    rows = [_redacted(row) for row in rows] if hide_personal else rows
    setup = fitting(setup, rows[0]) if rows else setup
    found = documents(rows, tokenizer, setup.objective)
    return [
        format_mask(row, sequence, tokenizer, setup.seq_len)
        for row, document in zip(rows, found, strict=True)
        for sequence in document.sequences
    ]


def _redacted(row: Row) -> Row:
    conversations = (
        turns and tuple(replace(m, content=redact(m.content)[0]) for m in turns)
        for turns in (row.messages, row.rejected)
    )
    messages, rejected = conversations
    return replace(row, messages=messages, rejected=rejected, text=row.text and redact(row.text)[0])
