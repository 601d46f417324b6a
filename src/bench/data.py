"""Training rows -> token ids with labels: chat template, loss on the answers only, audits, held-out split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.dataset import Row

IGNORE_INDEX = -100
"""The label that torch's cross-entropy leaves out."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """One training document: `input_ids` and `labels` are int32 arrays of one length (tokens).

    `labels[i]` is `input_ids[i]` where the token is trained, else -100; the model shifts them itself.
    `labels[0]` is always -100: nothing predicts the first token, also not inside a packed row.
    `group` is equal for exact duplicates and for pieces of one long text; the split keeps groups whole.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    group: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the document."""
        return len(self.input_ids)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that give a loss."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFacts:
    """What tokenising did to the rows; every loss of data is counted here. Lengths count tokens.

    `template`: "chat" (the tokenizer's own), "plain" (finefit's, for tokenizers without one) or "none" (plain
    texts). `spans`: how the answers were found: "marker", "prefix" or "search"; "all" where everything trains.
    """

    num_rows: int
    num_examples: int
    num_tokens: int
    num_trained_tokens: int
    num_truncated_rows: int
    num_lost_answer_tokens: int
    num_dropped_rows: int
    template: str
    template_sha256: str
    spans: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokenized:
    """The examples of a data set, in the order of its rows, and what tokenising did to them."""

    examples: list[Example]
    facts: TokenFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLengths:
    """Lengths of the rows in tokens, before any truncation."""

    num_rows: int
    total_tokens: int
    p50_tokens: int
    p90_tokens: int
    p99_tokens: int
    max_tokens: int


def tokenize_rows(
    rows: Sequence[Row], tokenizer: Any, *, seq_len: int, objective: str = "sft", path: str = "data"
) -> Tokenized:
    """Rows as examples of at most `seq_len` tokens; raises DataError when the audits fail."""
    raise NotImplementedError


def tokenize_file(
    path: Path, tokenizer: Any, *, seq_len: int, objective: str = "sft", cache_dir: Path | None = None
) -> Tokenized:
    """`tokenize_rows` of a file or folder through the cache of tokenised data (default: the user's cache)."""
    raise NotImplementedError


def split(
    examples: Sequence[Example], eval_fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(train, held out): deterministic, no group on both sides, at least one held out if the fraction is > 0."""
    raise NotImplementedError


def token_lengths(path: Path, tokenizer: Any, *, objective: str = "sft") -> TokenLengths:
    """The rows' lengths in tokens, for the planner."""
    raise NotImplementedError


def check_vocabulary(tokenizer: Any, embedding_rows: int) -> None:
    """Raise DataError when the tokenizer knows more tokens than the embedding has rows."""
    raise NotImplementedError
