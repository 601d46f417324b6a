"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): LoRA beside frozen weights in 4 or 8 bits."""

from __future__ import annotations

from dataclasses import replace

from planner.methods.lora import METHOD as LORA

METHOD = replace(
    LORA,
    name="qlora",
    summary="low-rank adapters beside frozen 4-bit weights (bitsandbytes)",
    quantises_base=True,
)
