"""What every program of benchmarks/train_speed.py trains on: the same tokens with the same labels."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field
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
    """Rows to train on, one pass over them; `held_out` is for the loss afterwards."""

    train: list[Any]
    held_out: list[Any]
    num_steps: int


def load_of(case: str, num_steps: int) -> Load:
    """`natural`: rows of their own lengths, whose answers train; `blocks`: full rows of BLOCK tokens that all train."""
    import numpy as np

    from bench.data import Example, split
    from bench.token_cache import tokenize_file
    from bench.weights import load_tokenizer
    from planner.setup import TrainSetup

    tokenizer = load_tokenizer(TrainSetup(model=MODEL))
    examples = tokenize_file(DATA, tokenizer, seq_len=LONGEST).examples
    train, held_out = split(examples, EVAL_FRACTION, SEED)
    order = np.random.default_rng(SEED).permutation(len(train))
    if case == "natural":
        chosen = [train[number] for number in order[: num_steps * ROWS_PER_STEP]]
        return Load(train=chosen, held_out=held_out, num_steps=num_steps)
    tokens = np.concatenate([train[number].input_ids for number in order])
    needed = num_steps * BLOCKS_PER_STEP * BLOCK
    blocks = np.resize(tokens, needed).reshape(-1, BLOCK).astype(np.int32)
    rows = []
    for number, block in enumerate(blocks):
        # the first token of a row has no prediction: others leave it out by shifting the labels
        labels = np.concatenate(([-100], block[1:])).astype(np.int32)
        rows.append(Example(input_ids=block, labels=labels, group=str(number)))
    return Load(train=rows, held_out=held_out, num_steps=num_steps)


@dataclass
class Clock:
    """Marks at the end of each step, and the real tokens of each micro-batch, which may be made before its step."""

    started: float
    marks: list[tuple[float, float]] = field(default_factory=list)
    batch_tokens: list[int] = field(default_factory=list)

    def mark(self) -> None:
        """A step has ended."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        others = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = usage.ru_utime + usage.ru_stime + others.ru_utime + others.ru_stime
        self.marks.append((cpu_s, time.time()))

    def figures(self, batches_per_step: int) -> dict[str, Any]:
        """Real tokens, CPU and wall seconds after the first step; how long the first took from the process' start."""
        (first_cpu_s, first_at), (cpu_s, at) = self.marks[0], self.marks[-1]
        return {
            "tokens": sum(self.batch_tokens[batches_per_step:]),
            "cpu_s": cpu_s - first_cpu_s,
            "wall_s": at - first_at,
            "first_step_cpu_s": first_cpu_s,
            "first_step_wall_s": first_at - self.started,
            "steps": len(self.marks),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def held_out_loss(model: Any, examples: list[Any]) -> float:
    """Mean loss of the held-out rows' trained tokens, by the same plain code for every program: float32 logits."""
    import torch
    from torch.nn import functional

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor(example.input_ids[None].astype("int64"))
            labels = torch.tensor(example.labels[1:].astype("int64"))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += example.num_trained_tokens
    return total / count
