"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): LoRA beside frozen weights in 4 or 8 bits."""

from __future__ import annotations

from planner.methods import Method
from planner.methods.lora import adapter_params, peft_config

METHOD = Method(
    name="qlora",
    summary="low-rank adapters beside frozen 4-bit weights (bitsandbytes)",
    trains_base=False,
    quantises_base=True,
    adapter_params=adapter_params,
    peft_config=peft_config,
    learning_rate=2e-4,
    learning_rate_source="QLoRA paper, table 9 (arXiv:2305.14314): 2e-4 up to 13B, 1e-4 above",
)
