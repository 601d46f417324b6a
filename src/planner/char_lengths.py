"""Row lengths where no tokenizer is at hand: an estimate by characters, marked as one.

Tokens per character of today's tokenizers, from two public counts: DeepSeek's API documentation (0.3 per English
character, 0.6 per Chinese one) and Cohere's over Wikipedia (model card multilingual-22-12: 4.8 English, 1.1 Chinese and 1.3
Japanese characters per token). The truth is taken to lie between both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from planner.dataset import Row
from planner.lengths import DataLengths

WIDE_TOKENS_PER_CHAR = (0.6, 1 / 1.1)
"""Of Chinese, Japanese and Korean writing: the lower and the higher count."""
NARROW_TOKENS_PER_CHAR = (1 / 4.8, 0.3)
"""Of all other writing."""
TURN_TOKENS = (0, 5)
"""That a chat template puts around a turn: ChatML writes `<|im_start|>`, the role, a line end, `<|im_end|>`, a line end."""
SYSTEM_TOKENS = (0, 30)
"""Of a conversation's head that some templates write by themselves: Qwen2.5's and SmolLM2's prompt, Llama 3.1's dates."""
MOST_ROWS = 2000
"""Rows that are looked at, evenly spaced by length."""

_WIDE = re.compile("[\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef]")


def estimated_lengths(rows: Sequence[Row]) -> DataLengths:
    """Lengths of the rows in tokens, from their characters; the longest is counted at the higher rate.

    Both conversations of a pair count.
    """
    sequences = [sequence for row in rows for sequence in row.sequences]
    chosen = spread_by_length(sequences, MOST_ROWS)
    lows, highs = zip(*(_tokens(row) for row in chosen), strict=True)
    middles = [max(1, round((low + high) / 2)) for low, high in zip(lows, highs, strict=True)]
    found = DataLengths.of(
        middles,
        num_rows=len(rows),
        longest=max(1, round(max(highs))),
        source=f"estimated from the characters of {len(chosen):,} of {len(sequences):,} rows, no tokenizer being at hand",
    )
    total = sum(middles)
    return replace(
        found,
        low_factor=min(1.0, sum(lows) / total),
        high_factor=max(1.0, sum(highs) / total),
        is_estimated=True,
    )


def spread_by_length(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most` rows, evenly spaced in their order by characters, the longest always among them."""
    ranked = sorted(rows, key=lambda row: row.num_chars)
    if len(ranked) <= most:
        return ranked
    step = len(ranked) / most
    return [ranked[int((number + 0.5) * step)] for number in range(most - 1)] + ranked[-1:]


def _tokens(row: Row) -> tuple[float, float]:
    texts = [message.content for message in row.messages or ()] + [row.text or ""]
    wide = sum(len(_WIDE.findall(text)) for text in texts)
    narrow = row.num_chars - wide
    turns = len(row.messages or ())
    low, high = (
        wide * WIDE_TOKENS_PER_CHAR[end]
        + narrow * NARROW_TOKENS_PER_CHAR[end]
        + turns * TURN_TOKENS[end]
        + bool(turns) * SYSTEM_TOKENS[end]
        for end in (0, 1)
    )
    return low, high
