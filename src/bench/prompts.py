"""A user's own prompts, as examples that a run answers at each evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.chat_template import ensure_template, render_text
from bench.data import IGNORE_INDEX, Example, load_rows, tokenize_rows
from planner.errors import DataError
from planner.setup import TrainSetup

TEXT_SUFFIXES = (".txt", ".md", "")


def read_prompts(path: Path, tokenizer: Any, setup: TrainSetup) -> list[Example]:
    """The prompts in a file: one a line of plain text, else rows of training data, whose answers are expected.

    Plain lines are asked as a user's turn, in pretraining as the beginning of a text. Raises DataError.
    """
    if path.suffix.lower() not in TEXT_SUFFIXES:
        rows = load_rows(path)
        return tokenize_rows(rows, tokenizer, seq_len=setup.seq_len, objective=setup.objective).examples
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(str(path), f"the prompts can't be read: {reason}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(str(path), "there is no prompt in it; write one a line")
    return [_example(prompt, tokenizer, setup) for prompt in prompts]


def _example(prompt: str, tokenizer: Any, setup: TrainSetup) -> Example:
    """Tokens without a trained one: all is prompt."""
    if setup.objective == "pretrain":
        ids = tokenizer(prompt)["input_ids"]
    else:
        ensure_template(tokenizer)
        turns = [{"role": "user", "content": prompt}]
        text = render_text(tokenizer, turns, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = np.array(ids, dtype=np.int32)
    return Example(input_ids=tokens, labels=np.full_like(tokens, IGNORE_INDEX), group=prompt)
