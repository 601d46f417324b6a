"""rsLoRA (Kalajdzievski 2023, arXiv:2312.03732): LoRA scaled by alpha / sqrt(rank), so that large ranks still learn."""

from __future__ import annotations

from dataclasses import replace

from planner.methods import FindMatrices, PeftCall
from planner.methods.lora import METHOD as LORA
from planner.methods.lora import options
from planner.setup import TrainSetup


def peft_config(setup: TrainSetup, find_matrices: FindMatrices) -> PeftCall:
    """PEFT's LoraConfig with its scale of alpha / sqrt(rank)."""
    return "LoraConfig", {**options(setup), "use_rslora": True}


METHOD = replace(
    LORA,
    name="rslora",
    summary="LoRA scaled by alpha / sqrt(rank): large ranks learn as fast as small ones",
    peft_config=peft_config,
    learning_rate=1e-4,
    large_learning_rate=None,
    proven_rank=None,
    learning_rate_source="PEFT's comparison of methods on MetaMathQA (Llama-3.2-3B, rank 64, alpha 64): 1e-4",
)
