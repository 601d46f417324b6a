"""The training rows' real token lengths for `finefit plan`, where the tokenizer is at hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from planner.errors import DataError, FinefitError
from planner.search import DataLengths
from planner.setup import TrainSetup


def row_lengths(wishes: Mapping[str, Any]) -> tuple[DataLengths | None, str | None]:
    """Lengths of the rows of `wishes["data"]`, or None and why they are unknown.

    Nothing is downloaded: a tokenizer that isn't on this machine is a reason. Raises DataError when the rows
    themselves are broken, since no plan can run on them.
    """
    from planner.dataset import read_rows

    fields = {
        name: wishes[name]
        for name in ("model", "revision", "tokenizer", "objective", "data")
        if name in wishes
    }
    setup = TrainSetup(**fields)
    data = str(setup.data)
    try:
        return _count_tokens(setup, data), None
    except ModuleNotFoundError as error:
        read_rows(data)
        return (
            None,
            f"the rows' lengths are unknown: counting tokens needs {error.name} (pip install 'finefit[train]')",
        )
    except DataError:
        raise
    except FinefitError as error:
        read_rows(data)
        return None, f"the rows' lengths are unknown: {error}"


def _count_tokens(setup: TrainSetup, data: str) -> DataLengths:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from bench.data import token_lengths
    from bench.weights import load_tokenizer

    found = token_lengths(data, load_tokenizer(setup), objective=setup.objective)
    return DataLengths(
        num_rows=found.num_rows,
        mean=found.total_tokens / found.num_rows,
        p50=found.p50_tokens,
        p99=found.p99_tokens,
        longest=found.max_tokens,
        source=f"{found.num_rows} rows through the model's tokenizer",
    )
