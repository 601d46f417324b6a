"""What this machine's device reaches, measured: matrix products, memory, attention, optimizer, dequantisation, links, launches.

Each figure is the median of repeated calls after a warm-up, in the shapes and dtypes that a training step has, with as
many threads as a run takes. Nothing is fitted: a rate is what was computed or moved, by planner.work's count, over the
time that it took.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.links import exchange_bytes_per_s
from bench.reference_steps import fit, run_references
from planner.optimizers import find_optimizer
from planner.rates import Curve, Rates
from planner.work import DEQUANTISED_BYTES

TOKENS = 512
"""Rows of a matrix product: a short micro-batch, as beginners' and CPUs' runs have them."""
WIDTHS = (64, 192, 576, 1536, 4096)
"""Rows and columns of a weight, from heads and adapters to the matrices of 7B models."""
LONG_TOKENS = 4096
POINTWISE_ELEMENTS = (1 << 18, 1 << 20, 1 << 22)
"""Of one activation: 512 tokens of a small model up to 4096 of a middle one."""
ATTENTION_SHAPE = (1, 8, 64)
"""Rows, heads, elements of a head."""
ATTENTION_LENGTHS = (128, 512, 1024, 2048)
OPTIMIZER_TENSORS, OPTIMIZER_ELEMENTS = 16, 1 << 20
PACKED_SHAPE = (4096, 1024)
EXCHANGED_BYTES = 16 << 20
TINY_OPERATIONS = 200
BACKWARD_PRODUCTS = 2.5
"""Matrix products of fused attention's backward over its forward's two: scores are computed again, five in all
(FlashAttention 2, arXiv:2307.08691, section 2.2)."""

LEAST_S, MOST_CALLS, LEAST_CALLS = 0.3, 200, 7
"""One figure's repetitions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One measured figure: the median `rate` in `unit`, the interquartile range over it, and how many calls."""

    name: str
    rate: float
    unit: str
    spread: float
    num_calls: int


Progress = Callable[[str, int, int], None]
"""Called with what is measured next, and which of how many parts that is (from 0)."""


def measure_rates(device: torch.device, progress: Progress) -> tuple[Rates, tuple[Reading, ...]]:
    """All of a device's rates, in under three minutes, and the readings that they are."""
    meter = _Meter(device)
    parts: Sequence[tuple[str, Callable[[_Meter], Any]]] = (
        ("matrix products", partial(_matmuls, calls=_forward_and_input)),
        ("weight gradients", partial(_matmuls, calls=_weight_gradient)),
        ("memory", _memory),
        ("attention", _attention),
        ("optimizer", _optimizer),
        ("clipping", _clipping),
        ("dequantisation", _dequantisation),
        ("launches", _launches),
        ("link", _link),
    )
    found = {}
    for number, (name, measure) in enumerate(parts):
        progress(name, number, len(parts) + 1)
        found[name] = measure(meter)
        gc.collect()
    host_s = found["launches"]
    # A processor launches nothing ahead: what the host takes for an operation is added to each.
    is_cpu = device.type == "cpu"
    single = Rates(
        matmul=found["matrix products"],
        weight_matmul=found["weight gradients"],
        clip_bytes_per_s=found["clipping"],
        attention=found["attention"],
        memory_bytes_per_s=found["memory"],
        optimizer_bytes_per_s=found["optimizer"],
        dequantise_bytes_per_s=found["dequantisation"],
        launch_s=0.0 if is_cpu else host_s,
        kernel_s=host_s if is_cpu else 0.0,
        link_bytes_per_s=found["link"],
    )
    progress("reference steps", len(parts), len(parts) + 1)
    steps = run_references(device)
    rates, errors = fit(single, steps, "kernel_s" if is_cpu else "launch_s")
    spread = math.sqrt(statistics.fmean(error * error for error in errors))
    for name, rate, unit in (
        ("memory in reference steps", rates.memory_bytes_per_s, "bytes/s"),
        ("operations in reference steps", 1 / (rates.kernel_s or rates.launch_s), "operations/s"),
    ):
        meter.add(Reading(name=name, rate=rate, unit=unit, spread=spread, num_calls=len(steps)))
    return replace(rates, source=_source(meter, len(steps), spread)), tuple(meter.readings)


def _source(meter: _Meter, num_steps: int, spread: float) -> str:
    return f"{len(meter.readings)} figures of this machine; {num_steps} reference steps are met within {spread:.0%}"


class _Meter:
    """Times calls on one device and keeps the readings."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.readings: list[Reading] = []

    def rate(self, name: str, unit: str, amount: float, call: Callable[[], Any]) -> float:
        """`amount` over the median time of a call."""
        times = self._times(call)
        low, _, high = statistics.quantiles(times, n=4)
        median = statistics.median(times)
        reading = Reading(
            name=name, rate=amount / median, unit=unit, spread=(high - low) / median, num_calls=len(times)
        )
        self.readings.append(reading)
        return reading.rate

    def add(self, reading: Reading) -> None:
        """A figure that was measured elsewhere."""
        self.readings.append(reading)

    def _times(self, call: Callable[[], Any]) -> list[float]:
        for _ in range(2):
            call()
        self._wait()
        times: list[float] = []
        while len(times) < LEAST_CALLS or (sum(times) < LEAST_S and len(times) < MOST_CALLS):
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return times

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
        """A tensor of small random numbers."""
        return (torch.randn(shape, device=self.device) * 0.02).to(dtype).requires_grad_(grad)


_DTYPES = {2: torch.bfloat16, 4: torch.float32}


Products = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[str, int]]
"""Multiplies an input, a weight and an output's gradient; what that was, and how many products."""


def _matmuls(meter: _Meter, calls: Products) -> dict[int, Curve]:
    return {width: Curve(tuple(sorted(_points(meter, dtype, calls)))) for width, dtype in _DTYPES.items()}


def _points(meter: _Meter, dtype: torch.dtype, calls: Products) -> Iterator[tuple[float, float]]:
    """(FLOPs of one product, FLOP/s)."""
    shapes = [(TOKENS, w, max(w, 64)) for w in WIDTHS] + [(LONG_TOKENS, 4096, 4096)]
    for tokens, inputs, outputs in shapes:
        x = meter.random(tokens, inputs, dtype=dtype)
        weight = meter.random(outputs, inputs, dtype=dtype)
        gradient = meter.random(tokens, outputs, dtype=dtype)
        flops = 2.0 * tokens * inputs * outputs
        what, count = calls(x, weight, gradient)
        name = f"{what} {_name(dtype)} {tokens} x {inputs} x {outputs}"
        yield flops, meter.rate(name, "FLOP/s", count * flops, partial(calls, x, weight, gradient))


def _forward_and_input(x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> tuple[str, int]:
    functional.linear(x, weight)
    gradient @ weight
    return "matmul", 2


def _weight_gradient(x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> tuple[str, int]:
    gradient.T @ x
    return "weight gradient", 1


def _memory(meter: _Meter) -> float:
    """Of pointwise operations on activations: the harmonic mean over sizes, for each moves the same share of a step."""
    rates = []
    for elements in POINTWISE_ELEMENTS:
        a, b = meter.random(elements), meter.random(elements)
        # silu reads one and writes one, the product and the sum read two and write one.
        moved = 4.0 * elements * (2 + 3 + 3)
        name = f"pointwise float32 {elements} elements"
        rates.append(meter.rate(name, "bytes/s", moved, partial(_pointwise, a, b)))
    return statistics.harmonic_mean(rates)


def _pointwise(a: torch.Tensor, b: torch.Tensor) -> None:
    functional.silu(a) * b + a


def _attention(meter: _Meter) -> dict[int, Curve]:
    return {
        width: Curve(tuple((float(length), _attend(meter, dtype, length)) for length in ATTENTION_LENGTHS))
        for width, dtype in _DTYPES.items()
    }


def _attend(meter: _Meter, dtype: torch.dtype, length: int) -> float:
    """FLOP/s of the pairs of positions that are needed, forward and backward, in causal attention."""
    rows, heads, elements = ATTENTION_SHAPE
    q, k, v = (meter.random(rows, heads, length, elements, dtype=dtype, grad=True) for _ in range(3))
    gradient = meter.random(rows, heads, length, elements, dtype=dtype)

    def call() -> None:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), gradient)

    forward = 4.0 * rows * heads * length * length * elements / 2
    name = f"attention {_name(dtype)} {length}"
    return meter.rate(name, "FLOP/s", forward * (1 + BACKWARD_PRODUCTS), call)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _optimizer(meter: _Meter) -> float:
    """In bfloat16, as full fine-tuning steps on weights; adapters, in float32, are too few to matter."""
    dtype = torch.bfloat16
    parameters = [
        nn.Parameter(meter.random(OPTIMIZER_ELEMENTS, dtype=dtype)) for _ in range(OPTIMIZER_TENSORS)
    ]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    rule, stepped = find_optimizer("adamw-fused"), dtype.itemsize * OPTIMIZER_ELEMENTS * OPTIMIZER_TENSORS
    # A fused step reads gradients and two states, and writes parameters and both states.
    moved = float(rule.num_accesses * stepped if rule.num_accesses else 3 * stepped + 2 * 2 * stepped)
    return meter.rate("optimizer step bfloat16", "bytes/s", moved, optimizer.step)


def _clipping(meter: _Meter) -> float:
    """Clipping of bfloat16 gradients by their norm: they are read for it, then read and written."""
    parameters = [
        nn.Parameter(meter.random(OPTIMIZER_ELEMENTS, dtype=torch.bfloat16)) for _ in range(OPTIMIZER_TENSORS)
    ]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    moved = 3.0 * torch.bfloat16.itemsize * OPTIMIZER_ELEMENTS * OPTIMIZER_TENSORS
    return meter.rate(
        "clipping bfloat16", "bytes/s", moved, lambda: nn.utils.clip_grad_norm_(parameters, 1.0)
    )


def _dequantisation(meter: _Meter) -> float:
    from bitsandbytes import functional as bnb

    weight = meter.random(*PACKED_SHAPE, dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    moved = DEQUANTISED_BYTES * weight.numel()
    return meter.rate("4-bit dequantisation", "bytes/s", moved, lambda: bnb.dequantize_4bit(packed, state))


def _launches(meter: _Meter) -> float:
    """Seconds of the host for one operation on next to nothing, recorded for the backward and run there again."""
    x = meter.random(8, grad=True)

    def call() -> None:
        y = x
        for _ in range(TINY_OPERATIONS):
            y = y * 1.5
        torch.autograd.grad(y.sum(), x)

    return 1.0 / meter.rate("tiny operations", "operations/s", 2.0 * TINY_OPERATIONS, call)


def _link(meter: _Meter) -> float | None:
    found = exchange_bytes_per_s(meter.device, EXCHANGED_BYTES)
    if found is None:
        return None
    rate, spread, num_calls = found
    meter.add(Reading(name="all-reduce", rate=rate, unit="bytes/s", spread=spread, num_calls=num_calls))
    return rate
