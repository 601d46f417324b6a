"""What every program of benchmarks/train_speed.py trains on: the same tokens with the same labels."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
DATA = Path(__file__).parents[1] / "data" / "chatterbot-en.jsonl"
ROWS_PER_STEP, LONGEST = 32, 512
BLOCK, BLOCKS_PER_STEP = 512, 4
LEARNING_RATE = 2e-4
EVAL_FRACTION, SEED = 0.06, 42


@dataclass(frozen=True, kw_only=True)
class Load:
    """Rows to train on, one pass over them; `held_out` is for the loss afterwards. `model` is a name or a folder with a
    tokenizer; `seq_len` the longest row.
    """

    train: list[Any]
    held_out: list[Any]
    num_steps: int
    rows_per_step: int
    model: str = MODEL
    device: str = "cpu"
    seq_len: int = 512


def load_of(case: str, num_steps: int) -> Load:
    """`natural`: rows of their own lengths, whose answers train; `blocks`: full rows of BLOCK tokens that all train."""
    train, held_out = real_rows()
    rows_per_step = ROWS_PER_STEP
    if case == "blocks":
        train, rows_per_step = full_rows(train, num_steps * BLOCKS_PER_STEP, BLOCK), BLOCKS_PER_STEP
    return Load(
        train=train[: num_steps * rows_per_step],
        held_out=held_out,
        num_steps=num_steps,
        rows_per_step=rows_per_step,
    )


def real_rows() -> tuple[list[Any], list[Any]]:
    """DATA's rows in an order of their own, tokenized, and those that are held out."""
    import numpy as np

    from bench.data import split
    from bench.token_cache import tokenize_file
    from bench.weights import load_tokenizer
    from planner.setup import TrainSetup

    tokenizer = load_tokenizer(TrainSetup(model=MODEL))
    examples = tokenize_file(DATA, tokenizer, seq_len=LONGEST).examples
    train, held_out = split(examples, EVAL_FRACTION, SEED)
    return [train[number] for number in np.random.default_rng(SEED).permutation(len(train))], held_out


def full_rows(train: list[Any], num_rows: int, length: int) -> list[Any]:
    """Rows of `length` tokens, cut from those of `train` one after the other, as often as it takes."""
    import numpy as np

    from bench.data import Example

    tokens = np.concatenate([example.input_ids for example in train])
    blocks = np.resize(tokens, num_rows * length).reshape(-1, length).astype(np.int32)
    rows = []
    for number, block in enumerate(blocks):
        # the first token of a row has no prediction: others leave it out by shifting the labels
        labels = np.concatenate(([-100], block[1:])).astype(np.int32)
        rows.append(Example(input_ids=block, labels=labels, group=str(number)))
    return rows


@dataclass
class Clock:
    """Marks at the end of each step, and the real tokens of each micro-batch, which may be made before its step; the
    first `num_discarded` steps don't count. `device` has done a step's work when it is marked. `patience_s`: no more steps
    are wanted so long after the first.
    """

    started: float
    num_discarded: int = 1
    device: str = "cpu"
    patience_s: float = math.inf
    marks: list[tuple[float, float]] = field(default_factory=list)
    batch_tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether enough has been measured."""
        is_measured = len(self.marks) > self.num_discarded
        return is_measured and self.marks[-1][1] - self.marks[0][1] > self.patience_s

    def mark(self) -> None:
        """A step has ended."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        others = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = usage.ru_utime + usage.ru_stime + others.ru_utime + others.ru_stime
        self.marks.append((cpu_s, time.time()))

    def figures(self, batches_per_step: int) -> dict[str, Any]:
        """Real tokens, CPU and wall seconds after the discarded steps; how long the first took from the process' start."""
        if len(self.marks) <= self.num_discarded:
            raise RuntimeError(f"{len(self.marks)} steps, of which {self.num_discarded} don't count")
        counted = self.batch_tokens[: len(self.marks) * batches_per_step]
        (before_cpu_s, before), (cpu_s, at) = self.marks[self.num_discarded - 1], self.marks[-1]
        ends = [at for _, at in self.marks[self.num_discarded - 1 :]]
        return {
            "tokens": sum(counted[self.num_discarded * batches_per_step :]),
            "cpu_s": cpu_s - before_cpu_s,
            "wall_s": at - before,
            "step_wall_s": [end - start for start, end in pairwise(ends)],
            "first_step_cpu_s": self.marks[0][0],
            "first_step_wall_s": self.marks[0][1] - self.started,
            "first_loss": self.losses[0] if self.losses else None,
            "steps": len(self.marks),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **_device_memory(self.device),
        }


def _device_memory(device: str) -> dict[str, int]:
    """The peaks of torch's allocator."""
    if device != "cuda":
        return {}
    import torch

    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def held_out_loss(model: Any, examples: list[Any]) -> float:
    """Mean loss of the held-out rows' trained tokens, by the same plain code for every program: float32 logits."""
    import torch
    from torch.nn import functional

    total, count = 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor(example.input_ids[None].astype("int64"), device=device)
            labels = torch.tensor(example.labels[1:].astype("int64"), device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += example.num_trained_tokens
    return total / count
