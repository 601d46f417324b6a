"""What finefit chooses where the user leaves a field open: precision, optimizer and rates by method and card."""

from __future__ import annotations

from typing import Any

from planner.families import attentions
from planner.methods import find_method
from planner.setup import CHOICES
from planner.specs import GpuProfile, ModelSpec

WARMUP_SHARE = 0.03
"""Share of a run's steps with a rising learning rate (QLoRA paper, appendix B)."""
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
