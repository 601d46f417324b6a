"""Laws of the memory model, and published runs that it must keep hitting."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.catalog import find_gpu
from planner.estimate import estimate
from planner.hf_config import model_spec
from planner.memory import estimate_memory
from planner.results import ALLOCATED_TERMS
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import gib

EVIDENCE = Path(__file__).parents[1] / "evidence" / "memory-runs.jsonl"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
MODEL = model_spec(CONFIG)

recipes = st.sampled_from(
    [
        {"method": "lora"},
        {"method": "lora", "adapter_dtype": "bfloat16"},
        {"method": "qlora"},
        {"method": "qlora", "autocast": "bfloat16", "kbit_upcast": True},
        {"method": "full"},
        {"method": "full", "weights_dtype": "float32", "autocast": "bfloat16"},
        {"method": "full", "master_weights": "float32"},
        {"method": "full", "optimizer": "adamw-8bit"},
    ]
)
shapes = st.fixed_dictionaries(
    {
        "micro_batch_size": st.integers(1, 8),
        "seq_len": st.sampled_from([64, 128, 512, 2048]),
        "grad_accum_steps": st.integers(1, 3),
        "checkpointing": st.sampled_from(["none", "full"]),
        "loss": st.sampled_from(["full", "chunked"]),
        "attention": st.sampled_from(["sdpa", "eager"]),
    }
)


def memory(**fields):
    return estimate_memory(TrainSetup(model=CONFIG, **fields), MODEL)


@given(recipes, shapes)
@settings(max_examples=150, deadline=None)
def test_terms_add_up_to_the_three_peaks(recipe, shape):
    found = memory(**recipe, **shape)
    allocated = sum(found.terms[name] for name in ALLOCATED_TERMS)
    assert found.peak_allocated_bytes == allocated
    assert found.peak_reserved_bytes == allocated + found.terms["fragmentation"]
    assert found.device_used_bytes == found.peak_reserved_bytes + found.terms["context"]
    assert min(found.terms.values()) >= 0
    assert abs(max(found.phases.values()) - allocated) <= len(ALLOCATED_TERMS)
    assert found.phases[found.peak_phase] == max(found.phases.values())


@given(recipes, shapes)
@settings(max_examples=100, deadline=None)
def test_more_never_needs_less(recipe, shape):
    base = memory(**recipe, **shape).peak_allocated_bytes
    for more in ({"micro_batch_size": shape["micro_batch_size"] + 1}, {"seq_len": 2 * shape["seq_len"]}):
        assert memory(**recipe, **{**shape, **more}).peak_allocated_bytes >= base
    deeper = {**CONFIG, "num_hidden_layers": 5}
    setup = TrainSetup(model=deeper, **recipe, **shape)
    assert estimate_memory(setup, model_spec(deeper)).peak_allocated_bytes >= base


@given(recipes, shapes)
@settings(max_examples=100, deadline=None)
def test_checkpointing_stores_less_and_leaves_the_steady_state(recipe, shape):
    without = memory(**recipe, **{**shape, "checkpointing": "none"})
    with_it = memory(**recipe, **{**shape, "checkpointing": "full"})
    assert with_it.phases["loss"] <= without.phases["loss"]
    assert with_it.phases["save"] == without.phases["save"]


@given(recipes, shapes, st.sampled_from(["zero2", "fsdp"]))
@settings(max_examples=60, deadline=None)
def test_more_gpus_hold_less_each(recipe, shape, sharding):
    two, four = (memory(**recipe, **shape, sharding=sharding, num_gpus=n).phases["save"] for n in (2, 4))
    assert four <= two


def test_pure_bf16_adamw_steps_at_ten_bytes_a_parameter():
    """Weights, gradients and two states of 2 bytes, and foreach's copy of one of them."""
    found = memory(method="full", seq_len=64)
    assert found.phases["optimizer"] - found.phases["save"] == pytest.approx(4 * MODEL.num_params, rel=1e-3)
    assert found.phases["save"] - found.phases["load"] == pytest.approx(4 * MODEL.num_params, rel=1e-3)


def published():
    for line in EVIDENCE.read_text().splitlines() if EVIDENCE.is_file() else ():
        case = json.loads(line)
        setup = case["setup"]
        is_plain = setup["kernels"] == "plain" and setup["num_gpus"] == 1 and case["lengths"] == "exact"
        if is_plain and case["id"].startswith("fms-") and "peak_allocated_gib" in case["measured"]:
            yield pytest.param(case, id=case["id"])


TOLERANCE = {"full": 0.001, "lora": 0.006, "qlora": 0.045}
"""Of the corrected setups, as first reached: what is worse than this is a step back."""


@pytest.mark.parametrize("case", list(published()))
def test_a_published_run_is_hit(case):
    fields = {**case["setup"], "stack": case["stack"], **case.get("corrected", {})}
    answer = estimate(TrainSetup.from_dict(fields), Machine(gpu=find_gpu(case["gpu"])))
    measured = case["measured"]["peak_allocated_gib"]
    assert gib(answer.memory.peak_allocated_bytes) == pytest.approx(measured, rel=TOLERANCE[fields["method"]])
