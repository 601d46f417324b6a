"""LoRA (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A with A, B trained and W frozen."""

from __future__ import annotations

from planner.methods import Method, PeftCall
from planner.setup import TrainSetup
from planner.specs import Matrix


def adapter_params(matrix: Matrix, setup: TrainSetup) -> int:
    """Elements of A (rank x in) and B (out x rank)."""
    return setup.rank * (matrix.in_features + matrix.out_features)


def peft_config(setup: TrainSetup) -> PeftCall:
    """PEFT's LoraConfig."""
    targets = setup.targets if isinstance(setup.targets, str) else list(setup.targets)
    return "LoraConfig", {
        "r": setup.rank,
        "lora_alpha": setup.alpha,
        "lora_dropout": setup.dropout,
        "target_modules": targets,
        "bias": "none",
    }


METHOD = Method(
    name="lora",
    summary="low-rank adapters beside frozen 16-bit weights",
    trains_base=False,
    quantises_base=False,
    adapter_params=adapter_params,
    peft_config=peft_config,
    learning_rate=2e-4,
    learning_rate_source="QLoRA paper, table 9 (arXiv:2305.14314): 2e-4 up to 13B, 1e-4 above",
)
