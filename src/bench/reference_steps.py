"""Small training steps that really run, for what no single kernel tells: the bandwidth and the overhead of a step's mix.

A step's element-wise operations read strided views, change dtypes and allocate their outputs; a large contiguous sum
does none of that. So the memory's rate and the time that each operation takes beside its work are those with which the
roofline of planner.throughput meets the reference steps best, with matrix products, attention, dequantisation and the optimizer
at their own measured rates. No plan is ever compared with the models that set them.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from planner.estimate import resolve
from planner.memory import MemoryModel
from planner.rates import Rates
from planner.setup import TrainSetup
from planner.throughput import TimeModel

NUM_STEPS = 4
"""After one to warm up."""


def _llama(hidden_size: int, layers: int, vocab_size: int) -> dict[str, Any]:
    return {
        "_name_or_path": f"reference-{hidden_size}x{layers}",
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": 8 * hidden_size // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": hidden_size // 192,
        "vocab_size": vocab_size,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }


_SMALL, _MIDDLE = _llama(384, 6, 12_000), _llama(960, 4, 24_000)
_CASES: tuple[tuple[dict[str, Any], str, str, str, int, int], ...] = (
    (_SMALL, "lora", "none", "bfloat16", 1, 128),
    (_SMALL, "lora", "full", "bfloat16", 3, 384),
    (_SMALL, "full", "none", "bfloat16", 2, 384),
    (_SMALL, "lora", "none", "float32", 1, 384),
    (_SMALL, "qlora", "none", "bfloat16", 1, 640),
    (_MIDDLE, "lora", "none", "bfloat16", 1, 384),
    (_MIDDLE, "full", "full", "bfloat16", 1, 640),
    (_MIDDLE, "qlora", "full", "bfloat16", 2, 256),
)
"""Model, method, checkpointing, dtype of the weights, rows, length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceStep:
    """A setup and the median seconds of its step."""

    setup: TrainSetup
    step_s: float


def reference_setups() -> Iterator[TrainSetup]:
    """What is run."""
    for model, method, checkpointing, dtype, rows, length in _CASES:
        yield TrainSetup(
            model=model,
            from_scratch=True,
            method=method,
            checkpointing=checkpointing,
            weights_dtype=dtype,
            micro_batch_size=rows,
            seq_len=length,
            optimizer="adamw-fused",
        )


def run_references(device: torch.device) -> tuple[ReferenceStep, ...]:
    """Run each."""
    return tuple(ReferenceStep(setup=s, step_s=_median_step_s(s, device)) for s in reference_setups())


def _median_step_s(setup: TrainSetup, device: torch.device) -> float:
    from bench.build import build_model
    from bench.optim import build_optimizer, build_schedule
    from bench.sample_rows import random_data
    from bench.step import TrainStep

    model = build_model(setup, weights=None, device=device)
    optimizer = build_optimizer(setup, model)
    step = TrainStep(setup, model, optimizer, schedule=build_schedule(setup, NUM_STEPS + 1))
    data = random_data(setup, model)
    times = []
    for _ in range(NUM_STEPS + 1):
        batch = data.step_batch(step.num_steps_done, device)
        start = time.perf_counter()
        step(batch.micro_batches, num_items=batch.num_items)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    del model, optimizer, step
    gc.collect()
    return statistics.median(times[1:])


def fit(rates: Rates, steps: Sequence[ReferenceStep], overhead: str) -> tuple[Rates, tuple[float, ...]]:
    """The rates with the memory's bandwidth and `overhead` (a field of Rates, in seconds) that meet the steps best.

    Best: the least sum of squared logarithms of measured over predicted, which are the second result.
    """
    timers = [_timer(step.setup, rates) for step in steps]

    def errors(bandwidth: float, seconds: float) -> tuple[float, ...]:
        tried = _with(rates, bandwidth, overhead, seconds)
        return tuple(
            math.log(step.step_s / _seconds(timer, tried, step.setup))
            for timer, step in zip(timers, steps, strict=True)
        )

    best = rates.memory_bytes_per_s, getattr(rates, overhead)
    width = 16.0
    while width > 1.01:
        factors = [width ** (i / 4) for i in range(-4, 5)]
        tried = [(best[0] * a, best[1] * b) for a in factors for b in factors]
        best = min(tried, key=lambda pair: sum(e * e for e in errors(*pair)))
        width = math.sqrt(width)
    return _with(rates, best[0], overhead, best[1]), errors(*best)


def _with(rates: Rates, bandwidth: float, overhead: str, seconds: float) -> Rates:
    changed: dict[str, Any] = {"memory_bytes_per_s": bandwidth, overhead: seconds}
    return replace(rates, **changed)


def _timer(setup: TrainSetup, rates: Rates) -> TimeModel:
    memory = MemoryModel(setup, resolve(setup), on_gpu=False)
    return TimeModel(memory.run, rates)


def _seconds(timer: TimeModel, rates: Rates, setup: TrainSetup) -> float:
    timer.rates = rates
    return timer.at(setup.micro_batch_size, setup.seq_len).seconds.total
