"""The batches of a traced step."""

from __future__ import annotations

from typing import Any

import torch

from bench.documents import Documents
from planner.setup import TrainSetup


def fake_batch(setup: TrainSetup, num_rows: int) -> dict[str, Any]:
    """What bench.batching.micro_batch makes of rows without padding: int64 [num_rows, seq_len], or all in one row.

    Hugging Face's collators, which a named stack stands for, give no positions. An encoder-decoder reads `seq_len`
    tokens and writes as many. `num_rows` are the data's: of a pair of answers the model reads two sequences.
    """
    num_rows *= setup.sequences_per_row
    shape = (num_rows, setup.seq_len)
    names = ("input_ids", "labels", "decoder_input_ids")[: 3 if setup.objective == "seq2seq" else 2]
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
    if setup.sequences_per_row > 1:
        batch["reference_logps"] = torch.zeros(num_rows)
    if not setup.stack and setup.objective != "seq2seq":
        batch["position_ids"] = torch.arange(setup.seq_len).repeat(num_rows, 1)
    return _joined(setup, batch) if setup.joins_rows else batch


def _joined(setup: TrainSetup, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Each row a document that is as long as rows may be."""
    num_rows, seq_len = batch["input_ids"].shape
    joined: dict[str, Any] = {name: tensor.view(1, -1) for name, tensor in batch.items()}
    if setup.attention == "sdpa":
        joined["documents"] = Documents(
            groups=((num_rows, seq_len),),
            places=torch.arange(num_rows * seq_len),
            starts=torch.arange(num_rows + 1, dtype=torch.int32),
            longest=seq_len,
        )
    return joined
