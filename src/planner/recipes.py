"""What finefit chooses where the user leaves a field open: precision, optimizer and rates by method and card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.families import attentions
from planner.methods import RATE_SHARES, find_method, learning_rate_source, peak_learning_rate
from planner.setup import CHOICES, TrainSetup
from planner.specs import GpuProfile, ModelSpec

WARMUP_SHARE = 0.03
"""Share of a run's steps with a rising learning rate (QLoRA paper, appendix B)."""
WARMUP_SOURCE = "QLoRA paper, appendix B"
LARGE_MODEL_PARAMS = 13.1e9
"""Beyond it the QLoRA paper halves the learning rate (table 9: 13B and less, 33B and more)."""
USUAL_RANK = 16
RANK_SOURCE = (
    "Thinking Machines, LoRA primer, 2025: LoRA learns as full fine-tuning does while its parameters are as many as the "
    "tokens trained on; alpha and the learning rate stay"
)
SHARDING = "fsdp"
"""How several GPUs share a setup where nothing is asked for: it splits weights, gradients and states."""


def shared_by(num_gpus: int) -> dict[str, Any]:
    """TrainSetup fields for that many GPUs."""
    return {} if num_gpus == 1 else {"num_gpus": num_gpus, "sharding": SHARDING}


def recipe(method: str, gpu: GpuProfile) -> dict[str, Any]:
    """TrainSetup fields that run on this card.

    With bfloat16: bf16 weights, float32 adapters (PEFT's default); full fine-tuning keeps bf16 weights, which
    is what fits (a plan tries float32 weights with autocast first). Without: float16 weights under a
    frozen base, float32 weights with float16 autocast where the base trains.
    """
    trains_base = find_method(method).trains_base
    fields: dict[str, Any] = {"method": method, "optimizer": "adamw-fused"}
    if gpu.bf16:
        return {**fields, "weights_dtype": "bfloat16", "autocast": None}
    if trains_base:
        return {**fields, "weights_dtype": "float32", "autocast": "float16"}
    return {**fields, "weights_dtype": "float16", "autocast": "float16"}


def attention_for(model: ModelSpec, gpu: GpuProfile) -> dict[str, Any]:
    """The attention of a model that can't run the default; nothing where it can."""
    able = attentions(model)
    if CHOICES["attention"][0] in able:
        return {}
    return {"attention": "flash" if "flash" in able and gpu.flash_attention else "eager"}


def precise_recipe(method: str, gpu: GpuProfile) -> dict[str, Any]:
    """The recipe whose updates aren't rounded away: float32 weights under autocast where the base trains."""
    if not find_method(method).trains_base:
        return recipe(method, gpu)
    sixteen_bit = "bfloat16" if gpu.bf16 else "float16"
    return {**recipe(method, gpu), "weights_dtype": "float32", "autocast": sixteen_bit}


def rates_for(setup: TrainSetup, model: ModelSpec) -> dict[str, Any]:
    """The learning rate where the method's own isn't for a model of this size, and nothing is asked for."""
    rate = find_method(setup.method).large_learning_rate
    is_large = not model.is_traced and model.num_params > LARGE_MODEL_PARAMS
    if not (rate and is_large and setup.learning_rate is None):
        return {}
    return {"learning_rate": rate * RATE_SHARES.get(setup.objective, 1)}


def describe_rates(setup: TrainSetup, model: ModelSpec, wanted_rank: int = USUAL_RANK) -> Iterator[str]:
    """Learning rate, warm-up and rank with their sources; `wanted_rank` is what the data could fill."""
    default = rates_for(setup.with_(learning_rate=None), model).get("learning_rate")
    is_default = setup.learning_rate in (None, default)
    source = learning_rate_source(setup) if is_default else "as asked"
    yield f"learning rate {peak_learning_rate(setup):g} ({source})"
    if setup.warmup_steps is None:
        yield f"warm-up over {100 * WARMUP_SHARE:g} % of the steps ({WARMUP_SOURCE})"
    if find_method(setup.method).has_rank:
        more = f"; the data could fill rank {wanted_rank}" if wanted_rank > setup.rank else ""
        yield f"rank {setup.rank}, alpha {setup.alpha:g}{more} ({RANK_SOURCE})"
