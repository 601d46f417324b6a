"""Traces against published runs: one A100-80GB, Hugging Face's Trainer, packed rows of exactly 4096 tokens.

Source: foundation-model-stack/fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv and a100_80gb_granite.csv at
876e2ed6f (transformers 4.48.1, peft 0.13.2, bitsandbytes 0.43.3, torch 2.4.1). Its scenarios.yaml sets
lora_dropout 0.1; its framework_plugin_bnb.py double quantisation. Peaks and steady bytes in GiB, as torch
counted them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.trace.estimate import trace_estimate
from bench.trace.run import trace
from planner.cases import case_fields
from planner.catalog import find_gpu
from planner.kept_traces import kept_predictor, read_traces
from planner.memory import CUBLAS_HANDLES, CUBLAS_WORKSPACE_BYTES
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import gib

EVIDENCE = Path(__file__).parents[1] / "evidence" / "memory-runs.jsonl"
TRACES = EVIDENCE.with_name("memory-runs-traced.jsonl")

pytestmark = pytest.mark.train

STACK = "transformers 4.48.1, peft 0.13.2, bitsandbytes 0.43.3, trl 0.13.0, torch 2.4.1"
LIGER_STACK = "transformers 4.45.2, peft 0.13.2, bitsandbytes 0.43.3, trl 0.11.4, torch 2.4.1"
WORKSPACE_BYTES = CUBLAS_HANDLES * CUBLAS_WORKSPACE_BYTES


def shape(
    model_type: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "tie_word_embeddings": model_type == "granite",
    }


MODELS = {
    "mistral-7b": shape("mistral", 4096, 14336, 32, 32, 8, 32000),
    "llama-2-70b": shape("llama", 8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "powerlm-3b": shape("granite", 2304, 9216, 40, 36, 36, 49152),
}
ADAPTERS = {"rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "dropout": 0.1}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", **ADAPTERS},
    "qlora": {"method": "qlora", "autocast": "bfloat16", "kbit_upcast": False, **ADAPTERS},
    "qlora-upcast": {"method": "qlora", "autocast": "bfloat16", "kbit_upcast": True, **ADAPTERS},
}
FUSED = {"kernels": "fused"}
LIGER = {"kernels": "liger", "loss": "fused", "autocast": "bfloat16"}
"""The plugin's own kernels, and with them its copy of Liger's loss (a100_80gb_liger.csv)."""
KERNEL_RUNS = [
    ("mistral-7b", "lora", FUSED, 4, 22.793),
    ("mistral-7b", "lora", FUSED, 8, 31.926),
    ("powerlm-3b", "full", FUSED, 8, 37.548),
    ("powerlm-3b", "lora", FUSED, 4, 15.715),
    ("llama-3-8b", "lora", LIGER, 4, 23.195),
    ("llama-3-8b", "lora", LIGER, 16, 47.396),
    ("llama-3-8b", "lora", {**FUSED, "stack": LIGER_STACK}, 4, 35.059),
    ("llama-3-8b", "qlora", {**LIGER, "stack": LIGER_STACK}, 4, 13.422),
    ("mistral-7b", "qlora", {**LIGER, "stack": LIGER_STACK}, 4, 12.140),
    ("mistral-7b", "qlora", {**FUSED, "stack": LIGER_STACK}, 8, 20.325),
]
RUNS = [
    ("mistral-7b", "full", 4, 67.460, 40.483),
    ("mistral-7b", "full", 8, 67.461, 40.483),
    ("mistral-7b", "lora", 4, 24.871, 13.657),
    ("mistral-7b", "lora", 8, 36.082, 13.658),
    ("mistral-7b", "qlora-upcast", 4, 19.250, 4.011),
    ("mistral-7b", "qlora-upcast", 8, 34.461, 4.012),
    ("mistral-7b", "qlora", 4, 15.249, 4.011),
    ("mistral-7b", "qlora", 8, 26.461, 4.011),
    ("llama-2-70b", "qlora", 4, 63.448, 34.626),
    ("powerlm-3b", "full", 4, 32.722, 19.641),
    ("powerlm-3b", "full", 8, 43.827, 19.642),
    ("powerlm-3b", "lora", 4, 18.785, 6.690),
    ("powerlm-3b", "lora", 8, 30.876, 6.690),
    ("powerlm-3b", "qlora-upcast", 4, 16.926, 1.997),
    ("powerlm-3b", "qlora-upcast", 8, 31.830, 1.997),
    ("powerlm-3b", "qlora", 4, 14.111, 1.994),
    ("powerlm-3b", "qlora", 8, 26.202, 1.995),
]


def setup_of(model: str, method: str, batch: int, **changes: Any) -> TrainSetup:
    return TrainSetup(
        model=MODELS[model],
        micro_batch_size=batch,
        seq_len=4096,
        packing=True,
        attention="flash",
        **{"stack": STACK, **METHODS[method], **changes},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method", "batch", "peak_gib", "steady_gib"), RUNS)
def test_the_trace_gives_the_published_memory(model, method, batch, peak_gib, steady_gib):
    result = trace(setup_of(model, method, batch))
    assert gib(result.peak_bytes + WORKSPACE_BYTES) == pytest.approx(peak_gib, rel=0.0025)
    assert gib(result.phases["save"].num_bytes + WORKSPACE_BYTES) == pytest.approx(steady_gib, rel=0.003)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method", "kernels", "batch", "peak_gib"), KERNEL_RUNS)
def test_fused_kernels_need_what_was_published(model, method, kernels, batch, peak_gib):
    result = trace(setup_of(model, method, batch, **kernels))
    assert gib(result.peak_bytes + WORKSPACE_BYTES) == pytest.approx(peak_gib, rel=0.0025)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fms-033", "fms-137", "fms-157"])
def test_a_kept_trace_is_what_the_trace_says(name):
    case = next(c for c in map(json.loads, EVIDENCE.read_bytes().splitlines()) if c["id"] == name)
    setup = TrainSetup.from_dict({**case_fields(case), **(case.get("corrected") or {})})
    machine = Machine(gpu=find_gpu(case["gpu"]))
    with TRACES.open("rb") as lines:
        kept = kept_predictor(read_traces(str(TRACES), lines))(setup, machine)
    assert trace_estimate(setup, machine).memory == kept.memory
