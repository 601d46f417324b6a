"""Time of an optimizer step, first version: 6 N (full) or 4 N (frozen base) FLOPs per token over the card's
dense 16-bit peak times the share of it that published runs of this card and method reached.

Known error: blind to launch overhead (small models are slower), attention at long sequences, checkpointing and
dequantisation beyond what the published runs had; so the interval is the 10th to 90th percentile of those runs.
A card without published runs gets no time, and neither do several GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.results import Time
from planner.setup import TrainSetup
from planner.specs import GpuProfile, ModelSpec


@dataclass(frozen=True, slots=True)
class _Reached:
    """Fractions of the dense bf16 peak: 10th percentile, median, 90th percentile."""

    low: float
    median: float
    high: float


REACHED = {
    ("A100", "lora"): _Reached(0.18, 0.30, 0.35),
    ("A100", "qlora"): _Reached(0.18, 0.28, 0.35),
    ("A100", "full"): _Reached(0.25, 0.43, 0.56),
    ("RTX 4090", "qlora"): _Reached(0.37, 0.40, 0.47),
    ("RTX 4090", "full"): _Reached(0.35, 0.53, 0.70),
}
"""Published fine-tuning runs (IBM fms-acceleration, torchtune, litgpt, LLaMA-Factory and others, 2023-2026):
tokens/s x 6N or 4N over the dense bf16 peak. Cards or methods with fewer than three quantiles are left out."""


def step_time(setup: TrainSetup, model: ModelSpec, gpu: GpuProfile) -> Time | None:
    """Seconds per optimizer step on one GPU; None where no published run says how fast the card is."""
    peak = gpu.flops.get("bfloat16")
    reached = next(
        (r for (card, method), r in REACHED.items() if gpu.name.startswith(card) and method == setup.method),
        None,
    )
    if peak is None or reached is None or setup.num_gpus > 1 or model.is_traced:
        return None
    tokens = setup.tokens_per_micro_batch * setup.grad_accum_steps
    flops = (4 if setup.uses_adapters else 6) * model.num_active_params * tokens
    step = flops / (peak * reached.median)
    return Time(
        step_s=step,
        low_step_s=flops / (peak * reached.high),
        high_step_s=flops / (peak * reached.low),
        tokens_per_s=tokens / step,
        mfu=reached.median,
        bound={"compute": step},
    )
