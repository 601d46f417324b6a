"""The training rows' real token lengths for the planner, where the tokenizer is at hand.

A large file is judged by a sample, evenly spaced by length. The tokenizer is read by itself where its folder has what
that needs: importing all of transformers takes longer than tokenising the sample.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.char_lengths import estimated_lengths, spread_by_length
from planner.dataset import Row, check_rows
from planner.errors import DataError, FinefitError
from planner.lengths import DataLengths
from planner.setup import PAIRED, TrainSetup

SAMPLE_ROWS = 1000
"""Rows that are tokenised."""

_FIELDS = ("model", "revision", "tokenizer", "objective", "data")


def row_lengths(wishes: Mapping[str, Any]) -> tuple[DataLengths, str | None]:
    """Lengths of the rows of `wishes["data"]`, and why they are only estimated from characters where they are.

    Nothing is downloaded: a tokenizer that isn't on this machine is a reason. Raises DataError when the rows
    themselves are broken, since no plan can run on them.
    """
    from bench.data import load_rows

    setup = TrainSetup(**{name: wishes[name] for name in _FIELDS if name in wishes})
    rows = load_rows(str(setup.data))
    check_rows(rows, setup.objective)
    try:
        return _counted(setup, rows), None
    except ModuleNotFoundError as error:
        reason = f"counting tokens needs {error.name} (pip install 'finefit[train]')"
    except DataError:
        raise
    except FinefitError as error:
        reason = str(error)
    return estimated_lengths(rows), f"the rows' lengths are estimated from their characters: {reason}"


def _counted(setup: TrainSetup, rows: Sequence[Row]) -> DataLengths:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sequences = [sequence for row in rows for sequence in row.sequences]
    chosen = spread_by_length(sequences, SAMPLE_ROWS)
    counts = _count(setup, chosen)
    if len(chosen) == len(sequences):
        source = f"{len(sequences):,} rows through the model's tokenizer"
        return DataLengths.of(counts, num_rows=len(rows), source=source)
    found = DataLengths.of(
        # the longest row was chosen for its length: it doesn't stand for others
        counts[:-1],
        num_rows=len(rows),
        longest=counts[-1],
        standard_error=_standard_error(counts[:-1]),
        source=f"{len(chosen):,} of {len(sequences):,} rows through the model's tokenizer",
    )
    # another row may have more tokens than the one with the most characters
    densest = max(
        count / max(1, row.num_chars) for count, row in zip(counts[-50:], chosen[-50:], strict=True)
    )
    most = max(found.longest, round(densest * chosen[-1].num_chars))
    return replace(found, longest=most)


def _standard_error(counts: Sequence[int]) -> float:
    """Of the mean of a sample that is evenly spaced along a trend: what neighbours differ by is chance."""
    steps = [(after - before) ** 2 for before, after in itertools.pairwise(counts)]
    return float((sum(steps) / (2 * len(steps)) / len(counts)) ** 0.5)


def _count(setup: TrainSetup, rows: Sequence[Row]) -> list[int]:
    """Tokens of each row, by the tokenizer's own library or by all of transformers."""
    count = _light_counter(setup)
    if count is not None:
        return count(rows)
    from bench.encode import documents
    from bench.weights import load_tokenizer

    # a pair's conversations have become rows of their own
    objective = "sft" if setup.objective in PAIRED else setup.objective
    return [len(document.ids) for document in documents(rows, load_tokenizer(setup), objective)]


def _light_counter(setup: TrainSetup) -> Callable[[Sequence[Row]], list[int]] | None:
    """A counter that doesn't import transformers' models; None where the folder needs more than that.

    It counts what `bench.encode` does, but for an end token that a template doesn't write.
    """
    from bench.weights import tokenizer_folder

    if setup.objective not in ("sft", "pretrain", *PAIRED):
        return None
    folder = tokenizer_folder(setup)
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not all(path.is_file() for path in (template, config, folder / "tokenizer.json")):
        return None
    return _Light(folder, template.read_text(encoding="utf-8"), json.loads(config.read_bytes()))


class _Light:
    """Counts with the tokenizer's file and its template alone."""

    def __init__(self, folder: Path, template: str, config: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = template
        self._tokens = {key: _content(config.get(key)) for key in config if key.endswith("_token")}

    def __call__(self, rows: Sequence[Row]) -> list[int]:
        texts = [self._text(row) for row in rows]
        is_plain = [row.text is not None for row in rows]
        counts: list[int] = []
        for text, plain in zip(texts, is_plain, strict=True):
            # a template writes every special token itself; a plain text gets the tokenizer's and an end token
            counts.append(len(self._tokenizer.encode(text, add_special_tokens=plain)) + plain)
        return counts

    def _text(self, row: Row) -> str:
        if row.text is not None:
            return row.text
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [{"role": m.role, "content": m.content} for m in row.messages or ()]
        try:
            rendered, _ = render_jinja_template([turns], chat_template=self._template, **self._tokens)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            message = f"the chat template refuses this conversation ({reason})"
            raise DataError(row.path, message, row.line) from error
        return str(rendered[0])


def _content(token: object) -> object:
    return token["content"] if isinstance(token, Mapping) else token
