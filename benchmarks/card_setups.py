"""The setups of benchmarks/card_runs.py: what people fine-tune on one large card, and each option once on a small model."""

from __future__ import annotations

from typing import Any

from planner.setup import TrainSetup

Case = tuple[str, str, str, int, int, dict[str, Any]]
"""Model, method, checkpointing, micro-batch, length, other fields."""

TIMED: tuple[Case, ...] = (
    ("llama-3.1-8b", "lora", "full", 1, 2048, {}),
    ("llama-3.1-8b", "lora", "none", 1, 2048, {}),
    ("llama-3.1-8b", "lora", "full", 4, 2048, {"loss": "chunked"}),
    ("llama-3.1-8b", "lora", "full", 1, 8192, {"loss": "chunked"}),
    ("llama-3.1-8b", "qlora", "full", 4, 1024, {}),
    ("qwen2.5-7b", "lora", "full", 2, 2048, {}),
    ("qwen2.5-7b", "qlora", "none", 1, 1024, {}),
    ("qwen2.5-14b", "qlora", "full", 2, 2048, {"loss": "chunked"}),
    ("llama-3.2-1b", "full", "none", 4, 1024, {}),
    ("smollm2-135m", "full", "none", 4, 512, {}),
    ("llama-3.2-3b", "full", "full", 4, 1024, {}),
    ("qwen2.5-0.5b", "lora", "none", 8, 512, {}),
    ("smollm2-1.7b", "lora", "none", 4, 2048, {}),
    ("qwen2.5-1.5b", "full", "full", 8, 1024, {"optimizer": "adamw-8bit"}),
    ("llama-3.2-1b", "lora", "full", 8, 1024, {"weights_dtype": "float32", "autocast": "bfloat16"}),
    ("gemma-2-2b", "lora", "full", 2, 2048, {"attention": "eager"}),
    ("mistral-7b-v0.3", "lora", "full", 4, 2048, {"kernels": "fused"}),
    ("qwen3-4b", "lora", "full", 4, 2048, {"loss": "chunked"}),
    ("llama-3.2-1b", "lora", "none", 8, 1024, {}),
    ("llama-3.2-1b", "lora", "none", 8, 1024, {"compile": True}),
    ("olmoe-1b-7b-0924", "lora", "full", 2, 2048, {}),
)
"""Run one at a time, for their step times too."""

_SMALL = ("llama-3.2-1b", "lora", "none", 2, 1024)
_LENGTHS: tuple[Case, ...] = tuple(
    ("qwen2.5-0.5b", "lora", checkpointing, rows, length, {})
    for checkpointing, rows, length in (
        ("none", 1, 256),
        ("none", 1, 4096),
        ("full", 1, 16384),
        ("full", 16, 512),
    )
)
_METHODS: tuple[Case, ...] = tuple(
    ("llama-3.2-1b", method, "none", 2, 1024, {})
    for method in ("rslora", "dora", "lora-fa", "ia3", "prompt", "prefix", "qlora", "full")
)
_OPTIMIZERS: tuple[Case, ...] = tuple(
    ("llama-3.2-1b", "full", "full", 2, 1024, {"optimizer": optimizer})
    for optimizer in (
        "adamw-fused",
        "adamw-8bit",
        "paged-adamw-8bit",
        "paged-adamw",
        "adafactor",
        "sgd",
        "lion",
        "lion-8bit",
    )
)
_OPTIONS: tuple[Case, ...] = tuple(
    (*_SMALL, options)
    for options in (
        {"loss": "chunked"},
        {"loss": "fused"},
        {"kernels": "fused"},
        {"kernels": "fused", "loss": "chunked", "adapter_dtype": "bfloat16"},
        {"kernels": "liger"},
        {"kernels": "liger", "loss": "fused"},
        {"attention": "eager"},
        {"compile": True},
        {"dropout": 0.05},
        {"grad_accum_steps": 4},
        {"packing": True},
        {"padding_free": True},
        {"weights_dtype": "float16", "autocast": "float16"},
        {"weights_dtype": "float32"},
        {"weights_dtype": "float32", "autocast": "bfloat16"},
        {"objective": "dpo"},
        {"targets": ["q_proj", "v_proj"], "rank": 64, "alpha": 128},
    )
)
_FULL: tuple[Case, ...] = tuple(
    ("llama-3.2-1b", "full", "none", 1, 1024, options)
    for options in (
        {"optimizer_in_backward": True},
        {"weights_dtype": "float32", "autocast": "bfloat16"},
        {"weights_dtype": "float32"},
        {"grad_accum_steps": 2},
    )
)
_QUANTISED: tuple[Case, ...] = tuple(
    ("qwen2.5-3b", "qlora", "full", 2, 1024, options)
    for options in (
        {"quant": "nf4"},
        {"quant": "int8"},
        {"kbit_upcast": True},
        {"optimizer": "paged-adamw-8bit"},
        {"autocast": "bfloat16"},
    )
)
_EAGER = ("bloom-560m", "gemma-2-2b")
"""transformers has no other attention for them."""
_FAMILIES: tuple[Case, ...] = tuple(
    (model, "lora", checkpointing, 1, 1024, {"attention": "eager"} if model in _EAGER else {})
    for model in (
        "gpt2-large",
        "pythia-1.4b",
        "opt-1.3b",
        "bloom-560m",
        "falcon-rw-1b",
        "phi-2",
        "phi-3-mini-4k-instruct",
        "gemma-2b",
        "gemma-2-2b",
        "gemma-3-1b-pt",
        "qwen1.5-moe-a2.7b",
        "qwen3-1.7b",
        "olmo-2-0425-1b",
        "granite-3.1-2b-base",
        "granite-3.1-1b-a400m-base",
        "stablelm-2-1_6b",
        "starcoder2-3b",
        "smollm3-3b",
        "glm-4-9b-0414",
        "deepseek-v2-lite",
    )
    for checkpointing in (("none", "full") if model in ("phi-2", "gemma-2-2b") else ("none",))
)
_LARGE: tuple[Case, ...] = (
    ("llama-3.1-8b", "qlora", "full", 1, 2048, {}),
    ("llama-3.1-8b", "lora", "full", 1, 16384, {"loss": "chunked"}),
    ("qwen2.5-32b", "qlora", "full", 1, 2048, {"loss": "chunked"}),
)
MEASURED: tuple[Case, ...] = (
    *_OPTIONS, *_METHODS, *_OPTIMIZERS, *_FULL, *_QUANTISED, *_FAMILIES, *_LENGTHS, *_LARGE,
)  # fmt: skip
"""Run several at a time, for their memory alone."""

GROUPS = {"timed": TIMED, "memory": MEASURED}


def setup_of(case: Case) -> TrainSetup:
    """The case's setup."""
    model, method, checkpointing, rows, length, others = case
    values = {
        "model": model,
        "method": method,
        "checkpointing": checkpointing,
        "micro_batch_size": rows,
        "seq_len": length,
        **others,
    }
    return TrainSetup.from_dict(values)
