"""Training rows -> token ids with labels: chat template, loss on the answers only, audits, held-out split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.chat_template import ensure_template
from bench.data_audit import TokenAudit, find_foreign_tokens, stop_at
from bench.encode import Document, documents
from planner.dataset import Row, nearest_rank, read_rows
from planner.dataset_files import Reader
from planner.errors import DataError

IGNORE_INDEX = -100
"""The label that torch's cross-entropy leaves out."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """One training document: `input_ids` and `labels` are int32 arrays of one length (tokens).

    `labels[i]` is `input_ids[i]` where the token is trained, else -100; the model shifts them itself.
    `labels[0]` is always -100: nothing predicts the first token, also not inside a packed row.
    `group` is equal for exact duplicates and for pieces of one long text; the split keeps groups whole.
    `row` is the number of the data's row, from 1; None for what came from no row.

    A pair of answers: this is the chosen one's conversation, and `rejected` the other's. `reference_logp` is the log
    probability of the labels under the model that a run begins with, None before it is known.
    """

    input_ids: Ids
    labels: Ids
    group: str
    row: int | None = None
    rejected: Example | None = None
    reference_logp: float | None = None

    @property
    def sequences(self) -> tuple[Example, ...]:
        """What the model reads: the document, or each conversation of a pair by itself."""
        if self.rejected is None:
            return (self,)
        return replace(self, rejected=None), self.rejected

    @property
    def num_tokens(self) -> int:
        """Tokens of the document, or of both conversations of a pair."""
        return sum(len(ids) for ids in self._parts("input_ids"))

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that give a loss."""
        return sum(int((labels != IGNORE_INDEX).sum()) for labels in self._parts("labels"))

    @property
    def width(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(ids) for ids in self._parts("input_ids"))

    def _parts(self, name: str) -> list[Ids]:
        return [getattr(part, name) for part in (self, self.rejected) if part is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFacts:
    """What tokenising did to the rows; every loss of data is counted. Lengths count tokens.

    `template`: "chat" (the tokenizer's own), "plain" (finefit's, for tokenizers without one) or "none" (plain
    texts). `spans`: how answers were found, see `bench.chat_template`; "all" where everything trains.
    `num_truncated_rows` lost tokens at seq_len, `num_lost_answer_tokens` of them trained ones; `num_dropped_rows` of
    these rows had no trained token left, or of a pair no difference. In pretraining, long texts are cut into several examples
    (`num_split_rows`) and lose at most a last single token. `num_control_token_rows` hold the text of a control token such as
    <|im_end|>, which the tokenizer reads as one; in `num_cut_thought_rows` the template left out thoughts.
    """

    num_rows: int
    num_examples: int
    num_tokens: int
    num_trained_tokens: int
    num_truncated_rows: int
    num_lost_answer_tokens: int
    num_dropped_rows: int
    num_split_rows: int
    num_control_token_rows: int
    num_cut_thought_rows: int
    template: str
    template_sha256: str
    spans: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokenized:
    """The examples of a data set, in the order of its rows, and what tokenising did to them."""

    examples: list[Example]
    facts: TokenFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLengths:
    """Lengths of the rows in tokens, before any truncation; percentiles by nearest rank."""

    num_rows: int
    total_tokens: int
    p50_tokens: int
    p90_tokens: int
    p99_tokens: int
    max_tokens: int


def tokenize_rows(rows: Sequence[Row], tokenizer: Any, *, seq_len: int, objective: str = "sft") -> Tokenized:
    """Rows as examples of at most `seq_len` tokens.

    Objective sft trains all assistant turns, each with the token that ends it; pretrain trains every token; dpo makes
    an example of each pair of answers.
    A tokenizer without a chat template gets the plain one. Raises DataError with the line of a row that can't be
    written, and when an audit fails (`bench.data_audit`): more than 1 % of the rows without a trained token, no turn
    ever ended, or two BOS tokens.
    """
    template = "none" if all(row.text is not None for row in rows) else ensure_template(tokenizer)
    found = list(documents(rows, tokenizer, objective))
    results = [
        (document, [replace(example, row=row) for example in cut(document, seq_len, objective)])
        for row, document in enumerate(found, start=1)
    ]
    _audit(rows, results, TokenAudit(seq_len=seq_len, objective=objective, bos_id=tokenizer.bos_token_id))
    facts = _facts(results, template, tokenizer)
    return Tokenized(examples=[example for _, examples in results for example in examples], facts=facts)


def split(
    examples: Sequence[Example], eval_fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(train, held out), both in their old order; depends on the examples' content and the seed alone.

    Groups go to one side whole, so no duplicate straddles the split. At least one example is held out if the fraction
    is above 0. Raises DataError when the examples make fewer than two groups.
    """
    if eval_fraction <= 0:
        return list(examples), []
    sizes: dict[str, int] = {}
    for example in examples:
        sizes[example.group] = sizes.get(example.group, 0) + 1
    if len(sizes) < 2:
        message = f"{len(sizes)} distinct row(s) can't be split into training and held-out rows; add rows or set eval_fraction 0"
        raise DataError("data", message)
    wanted = max(1, round(len(examples) * eval_fraction))
    held_out: set[str] = set()
    num_held_out = 0
    for group in sorted(sizes, key=lambda group: _draw(group, seed))[:-1]:
        if num_held_out >= wanted:
            break
        held_out.add(group)
        num_held_out += sizes[group]
    train = [example for example in examples if example.group not in held_out]
    return train, [example for example in examples if example.group in held_out]


def token_lengths(path: str | Path, tokenizer: Any, *, objective: str = "sft") -> TokenLengths:
    """The rows' lengths in tokens, for the planner. Raises DataError."""
    rows = load_rows(path)
    if any(row.text is None for row in rows):
        ensure_template(tokenizer)
    lengths = sorted(document.num_tokens for document in documents(rows, tokenizer, objective))
    return TokenLengths(
        num_rows=len(rows),
        total_tokens=sum(lengths),
        p50_tokens=nearest_rank(lengths, 0.50),
        p90_tokens=nearest_rank(lengths, 0.90),
        p99_tokens=nearest_rank(lengths, 0.99),
        max_tokens=lengths[-1],
    )


def load_rows(path: str | Path) -> list[Row]:
    """`planner.dataset.read_rows`, and Parquet where pyarrow is installed. Raises DataError."""
    return read_rows(path, readers=extra_readers())


def extra_readers() -> Mapping[str, Reader]:
    """Readers of the kinds of file that need more than the standard library."""
    import importlib.util

    return {".parquet": _read_parquet} if importlib.util.find_spec("pyarrow") else {}


def _read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    """A record's line is its number, from 1."""
    import importlib

    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(str(path), f"can't be read as Parquet ({str(error).splitlines()[0]})") from error


def check_vocabulary(tokenizer: Any, embedding_rows: int) -> None:
    """Raise DataError when the tokenizer has ids that the embedding has no row for."""
    stop_at(find_foreign_tokens(tokenizer, embedding_rows))


def cut(document: Document, seq_len: int, objective: str) -> list[Example]:
    """The examples of at most `seq_len` tokens that a document gives: one or none, several pieces in pretraining."""
    return _CUTS.get(objective, _beginning)(document, seq_len)


def _beginning(document: Document, seq_len: int) -> list[Example]:
    """The first `seq_len` tokens, or nothing where none of these trains."""
    example = _example(document.ids[:seq_len], document.trained[:seq_len])
    return [example] if example.num_trained_tokens else []


def _pieces(document: Document, seq_len: int) -> list[Example]:
    """All tokens in examples of `seq_len`; a last single token would train nothing."""
    ids, trained, group = document.ids, document.trained, _digest(document.ids)
    starts = range(0, len(ids), seq_len)
    parts = [_example(ids[s : s + seq_len], trained[s : s + seq_len], group) for s in starts]
    return [part for part in parts if part.num_trained_tokens]


def _pair(document: Document, seq_len: int) -> list[Example]:
    """Both conversations' first `seq_len` tokens, or nothing where one trains nothing or both have become one."""
    chosen, rejected = (
        _example(sequence.ids[:seq_len], sequence.trained[:seq_len]) for sequence in document.sequences
    )
    if not (chosen.num_trained_tokens and rejected.num_trained_tokens) or chosen.group == rejected.group:
        return []
    return [
        replace(
            chosen, rejected=rejected, group=_digest(np.concatenate((chosen.input_ids, rejected.input_ids)))
        )
    ]


_CUTS = {"pretrain": _pieces, "dpo": _pair}


def num_kept_tokens(document: Document, examples: Sequence[Example]) -> tuple[int, ...]:
    """Of each of the document's sequences, the tokens from its beginning that its examples hold."""
    if document.rejected is None:
        return (sum(example.num_tokens for example in examples),)
    return tuple(s.num_tokens for s in examples[0].sequences) if examples else (0, 0)


def num_lost_answer_tokens(document: Document, kept: Sequence[int]) -> int:
    """Trained tokens beyond those."""
    return sum(int(s.trained[n:].sum()) for s, n in zip(document.sequences, kept, strict=True))


def is_cut(document: Document, kept: Sequence[int]) -> list[bool]:
    """Of each of the document's sequences whether some of it is lost."""
    return [n < len(s.ids) for s, n in zip(document.sequences, kept, strict=True)]


def _example(ids: Ids, trained: npt.NDArray[np.bool_], group: str = "") -> Example:
    labels = np.where(trained, ids, IGNORE_INDEX).astype(np.int32)
    labels[:1] = IGNORE_INDEX
    return Example(input_ids=ids, labels=labels, group=group or _digest(ids))


def _digest(ids: Ids) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()[:32]


_Result = tuple[Document, list[Example]]


def _audit(rows: Sequence[Row], results: Sequence[_Result], audit: TokenAudit) -> None:
    for row, (document, examples) in zip(rows, results, strict=True):
        audit.add(row, document, trains=bool(examples))
    for finding in audit.findings():
        raise finding.as_error()


def _facts(results: Sequence[_Result], template: str, tokenizer: Any) -> TokenFacts:
    found = [document for document, _ in results]
    examples = [example for _, examples in results for example in examples]
    num_trained = sum(example.num_trained_tokens for example in examples)
    kept = [(document, num_kept_tokens(document, pieces)) for document, pieces in results]
    cut = [(document, num_kept) for document, num_kept in kept if any(is_cut(document, num_kept))]
    written = tokenizer.chat_template if template != "none" else ""
    return TokenFacts(
        num_rows=len(results),
        num_examples=len(examples),
        num_tokens=sum(example.num_tokens for example in examples),
        num_trained_tokens=num_trained,
        num_truncated_rows=len(cut),
        num_lost_answer_tokens=sum(num_lost_answer_tokens(document, num_kept) for document, num_kept in cut),
        num_dropped_rows=sum(not e for _, e in results),
        num_split_rows=sum(len(e) > 1 for _, e in results),
        num_control_token_rows=sum(document.has_control_tokens for document in found),
        num_cut_thought_rows=sum(document.cuts_thoughts for document in found),
        template=template,
        template_sha256=hashlib.sha256(written.encode()).hexdigest(),
        spans=tuple(sorted({document.method for document in found})),
    )


def _draw(group: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()
