"""What a data set holds, and what a training run would make of it; read once, row by row, in bounded memory."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.data import extra_readers
from bench.data_personal import redact
from bench.data_report import Found, Inspection, Overlap, lengths_of
from bench.data_similar import Firsts, SimilarRows, repeats, similar_rows
from bench.data_text_checks import contents, encoding_faults, language
from bench.data_tokens import TokenLook
from planner.dataset import FaultyRow, Row, Source
from planner.dataset_files import estimate_records
from planner.errors import FinefitError
from planner.setup import TrainSetup

SAMPLE_ROWS = 50_000
"""Rows whose tokens and language are looked at, unless all are asked for: the template costs 0.4 ms a row."""
SHOWN_LINES = 5
"""Lines that are named of each thing found."""
BATCH_ROWS = 500

Progress = Callable[[str, int, int], None]
"""Called with (what is done, rows done, rows there are, about)."""


def inspect(
    path: str | Path,
    setup: TrainSetup | None = None,
    *,
    eval_path: str | Path | None = None,
    sample_rows: int | None = SAMPLE_ROWS,
    progress: Progress = lambda *_: None,
) -> Inspection:
    """Inspect a file or a folder; with a setup also as its model and seq_len would see it.

    Tokens and languages are those of `sample_rows` rows drawn evenly (None: all). Raises DataError for what holds no
    row at all; rows that can't be read are counted instead.
    """
    tokenizer, notes = (None, []) if setup is None else find_tokenizer(setup)
    with similar_rows() as index:
        look = _Look(path, index, sample_rows, TokenLook.of(setup, tokenizer))
        look.read(progress)
        eval_rows = None if eval_path is None else _read_eval(eval_path, index)
        progress("comparing rows", look.num_rows, look.num_rows)
        exact, near = index.exact_firsts(), index.near_firsts()
    if look.characters and look.num_sampled < look.num_rows:
        notes.append(f"tokens and languages are those of {look.num_sampled:,} rows, drawn evenly")
    overlap = None if eval_rows is None else _overlap(str(eval_path), eval_rows, look.num_rows, exact, near)
    return replace(
        look.report(),
        exact_duplicates=_duplicates(exact[: look.num_rows], look.places),
        near_duplicates=_duplicates(_only_near(exact, near)[: look.num_rows], look.places),
        overlap=overlap,
        notes=tuple(notes),
    )


def find_tokenizer(setup: TrainSetup) -> tuple[Any, list[str]]:
    """(the setup's tokenizer, no notes), or (None, why there is none); nothing is downloaded."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from bench.weights import load_tokenizer

    try:
        return load_tokenizer(setup), []
    except FinefitError as error:
        return None, [f"no token is counted, lengths are in characters: {error}"]


class _Tally:
    """Counts of one kind of thing, and the first places where it was seen."""

    def __init__(self) -> None:
        self.num_rows = self.count = 0
        self.first: list[str] = []

    def add(self, place: str, count: int = 1) -> None:
        self.num_rows += 1
        self.count += count
        if len(self.first) < SHOWN_LINES:
            self.first.append(place)

    def found(self) -> Found:
        return Found(num_rows=self.num_rows, count=self.count, first=tuple(self.first))


class _Tallies(dict[str, _Tally]):
    def __missing__(self, name: str) -> _Tally:
        return self.setdefault(name, _Tally())

    def found(self) -> dict[str, Found]:
        return {name: self[name].found() for name in sorted(self)}


class _Places:
    """FILE:LINE of each row by its number, in 4 bytes a row."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.starts: list[int] = []
        self.lines = array("I")

    def add(self, row: Row) -> None:
        if not self.paths or self.paths[-1] != row.path:
            self.paths.append(row.path)
            self.starts.append(len(self.lines))
        self.lines.append(row.line)

    def __getitem__(self, number: int) -> str:
        from bisect import bisect_right

        return f"{self.paths[bisect_right(self.starts, number) - 1]}:{self.lines[number]}"


class _Look:
    """One pass over a data set."""

    def __init__(
        self, path: str | Path, index: SimilarRows, sample_rows: int | None, tokens: TokenLook | None
    ) -> None:
        self.source = Source(path, extra_readers())
        self.index, self.tokens = index, tokens
        self.about = estimate_records(Path(path), self.source.readers)
        self.share = 1.0 if sample_rows is None else min(1.0, sample_rows / self.about)
        self.places = _Places()
        self.characters = array("I")
        self.num_sampled = self.num_faulty = self.num_pairs = 0
        self.fault_message: str | None = None
        self.faults, self.personal, self.encoding = _Tallies(), _Tallies(), _Tallies()
        self.languages: Counter[str] = Counter()

    @property
    def num_rows(self) -> int:
        return len(self.characters)

    def read(self, progress: Progress) -> None:
        for item in self.source.rows_and_faults():
            if isinstance(item, FaultyRow):
                self._count_fault(item)
            else:
                self._look_at(item)
            done = self.num_rows + self.num_faulty
            if done % BATCH_ROWS == 0:
                progress("reading", done, max(done, self.about))
        if self.tokens is not None:
            self.tokens.flush()

    def _count_fault(self, fault: FaultyRow) -> None:
        self.num_faulty += 1
        self.fault_message = self.fault_message or str(fault.as_error())
        self.faults[fault.kind].add(f"{fault.path}:{fault.line}")

    def _look_at(self, row: Row) -> None:
        place = f"{row.path}:{row.line}"
        self.places.add(row)
        self.index.add(row)
        self.num_pairs += row.rejected is not None
        for name in encoding_faults(row):
            self.encoding[name].add(place)
        personal: Counter[str] = Counter()
        for text in contents(row):
            personal.update(redact(text)[1])
        for name, count in personal.items():
            self.personal[name].add(place, count)
        if _is_drawn(self.num_rows, self.share):
            self.num_sampled += 1
            self.languages[language(row)] += 1
            if self.tokens is not None:
                self.tokens.add(row)
        self.characters.append(min(row.num_chars, 2**32 - 1))

    def report(self) -> Inspection:
        """What one pass shows; duplicates come later."""
        nothing = _Tally().found()
        return Inspection(
            path=str(self.source.path),
            format=self.source.format.name if self.source.format else "unknown",
            num_files=len(self.source.files),
            size_bytes=sum(file.stat().st_size for file in self.source.files),
            num_rows=self.num_rows,
            num_pairs=self.num_pairs,
            faults=self.faults.found(),
            fault_message=self.fault_message,
            ignored_columns=tuple(sorted(self.source.ignored_columns)),
            characters=lengths_of("characters", self.characters),
            tokens=None if self.tokens is None else self.tokens.report(),
            exact_duplicates=nothing,
            near_duplicates=nothing,
            overlap=None,
            languages=dict(self.languages.most_common()),
            num_language_rows=self.num_sampled,
            personal=self.personal.found(),
            encoding=self.encoding.found(),
            findings=() if self.tokens is None else tuple(self.tokens.findings()),
        )


def _is_drawn(number: int, share: float) -> bool:
    """Whether row `number` is in the sample: a fixed scatter of the numbers, so that any file is drawn from evenly."""
    return (number * 2654435761 & 0xFFFFFFFF) < share * 2**32


def _read_eval(path: str | Path, index: SimilarRows) -> _Places:
    """The evaluation file's rows behind the training rows in the index; faulty ones are not its business."""
    places = _Places()
    for item in Source(path, extra_readers()).rows_and_faults():
        if isinstance(item, Row):
            index.add(item)
            places.add(item)
    return places


def _only_near(exact: Firsts, near: Firsts) -> Firsts:
    """Like `near`, but a row that repeats another exactly is its own first."""
    numbers = np.arange(len(exact), dtype=np.int32)
    return np.where(exact == numbers, near, numbers)


def _duplicates(firsts: Firsts, places: _Places) -> Found:
    found = repeats(firsts)
    shown = [f"{places[n]} repeats {places[int(firsts[n])]}" for n in found[:SHOWN_LINES].tolist()]
    return Found(num_rows=len(found), count=len(found), first=tuple(shown))


def _overlap(path: str, eval_rows: _Places, num_train: int, exact: Firsts, near: Firsts) -> Overlap:
    """Evaluation rows stand behind all training rows, so a first below `num_train` is a training row."""
    same = exact[num_train:] < num_train
    alike = (near[num_train:] < num_train) & ~same
    return Overlap(
        path=path,
        num_rows=len(eval_rows.lines),
        exact=_eval_found(same, eval_rows),
        near=_eval_found(alike, eval_rows),
    )


def _eval_found(chosen: npt.NDArray[np.bool_], eval_rows: _Places) -> Found:
    numbers = chosen.nonzero()[0].tolist()
    first = tuple(eval_rows[number] for number in numbers[:SHOWN_LINES])
    return Found(num_rows=len(numbers), count=len(numbers), first=first)
