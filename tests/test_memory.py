"""Laws of the memory model."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from family_configs import CONFIGS, label
from planner.hf_config import model_spec
from planner.memory import CUBLAS_WORKSPACE_BYTES, CUBLAS_WORKSPACE_HOPPER_BYTES, estimate_memory
from planner.results import ALLOCATED_TERMS, PHASES
from planner.setup import TrainSetup

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


@given(recipes, shapes)
@settings(max_examples=60, deadline=None)
def test_no_phase_is_above_the_peak_and_steady_is_below_all(recipe, shape):
    found = memory(**recipe, **shape)
    assert set(found.phases) == set(PHASES)
    assert max(found.phases.values()) == found.phases[found.peak_phase]
    for phase in ("forward", "loss", "backward", "optimizer", "eval", "resume"):
        assert found.phases[phase] >= found.phases["save"] - 32 * shape["micro_batch_size"] * shape["seq_len"]
    assert found.phases["load"] <= found.phases["save"]


@given(shapes, st.integers(1, 64), st.sampled_from(["lora", "qlora"]))
@settings(max_examples=50, deadline=None)
def test_a_higher_rank_or_more_targets_never_need_less(shape, rank, method):
    few = memory(method=method, rank=rank, targets=["q_proj"], **shape).peak_allocated_bytes
    assert memory(method=method, rank=rank + 1, targets=["q_proj"], **shape).peak_allocated_bytes >= few
    assert (
        memory(method=method, rank=rank, targets=["q_proj", "up_proj"], **shape).peak_allocated_bytes >= few
    )
    assert memory(method=method, rank=rank, **shape).peak_allocated_bytes >= few


@given(recipes, shapes)
@settings(max_examples=50, deadline=None)
def test_checkpointing_keeps_no_more_activations(recipe, shape):
    """Nor does it lower the optimizer's step; what it costs is one layer at a time."""
    without = memory(**recipe, **{**shape, "checkpointing": "none"})
    with_it = memory(**recipe, **{**shape, "checkpointing": "full"})
    assert with_it.phases["forward"] <= without.phases["forward"]
    assert with_it.phases["backward"] <= without.phases["backward"] * 1.001
    assert with_it.phases["optimizer"] == without.phases["optimizer"]


@given(recipes, st.integers(1, 4), st.sampled_from([2048, 4096, 16_384]))
@settings(max_examples=40, deadline=None)
def test_a_chunked_loss_never_needs_more_than_all_logits_of_long_rows(recipe, batch, seq_len):
    shape = {"micro_batch_size": batch, "seq_len": seq_len, "checkpointing": "full"}
    full, chunked = (memory(**recipe, **shape, loss=loss) for loss in ("full", "chunked"))
    assert chunked.peak_allocated_bytes <= full.peak_allocated_bytes
    assert chunked.phases["loss"] < full.phases["loss"]


@given(recipes, shapes, st.sampled_from(["zero1", "zero2", "fsdp", "fsdp1", "device_map"]))
@settings(max_examples=60, deadline=None)
def test_more_gpus_never_need_more_each(recipe, shape, sharding):
    needs = [memory(**recipe, **shape, sharding=sharding, num_gpus=n).peak_allocated_bytes for n in (2, 4, 8)]
    assert needs == sorted(needs, reverse=True)


@given(recipes, shapes)
@settings(max_examples=40, deadline=None)
def test_waiting_gradients_never_need_less(recipe, shape):
    once = memory(**recipe, **{**shape, "grad_accum_steps": 1})
    often = memory(**recipe, **{**shape, "grad_accum_steps": 4})
    assert often.peak_allocated_bytes >= once.peak_allocated_bytes
    assert often.phases["save"] == once.phases["save"]
    more = memory(**recipe, **{**shape, "grad_accum_steps": 9})
    added = 5 * 24 * shape["micro_batch_size"] * shape["seq_len"]
    assert 0 <= more.peak_allocated_bytes - often.peak_allocated_bytes <= added, (
        "a third micro-batch adds its own ids, labels and positions"
    )


@given(recipes, shapes, st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_a_larger_evaluation_batch_only_touches_the_evaluation(recipe, shape, rows):
    usual, larger = memory(**recipe, **shape), memory(**recipe, **shape, eval_batch_size=rows)
    assert {p: larger.phases[p] for p in PHASES if p != "eval"} == {
        p: usual.phases[p] for p in PHASES if p != "eval"
    }
    is_larger = rows >= shape["micro_batch_size"]
    assert (larger.phases["eval"] >= usual.phases["eval"]) == is_larger or rows == shape["micro_batch_size"]


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_every_family_has_a_positive_answer_that_adds_up(config):
    spec = model_spec(config)
    for method, checkpointing in itertools.product(("lora", "full", "qlora"), ("none", "full")):
        setup = TrainSetup(model=config, method=method, checkpointing=checkpointing, seq_len=64)
        found = estimate_memory(setup, spec)
        assert min(found.terms.values()) >= 0
        assert found.phases["backward"] > found.phases["save"]
        assert abs(max(found.phases.values()) - found.peak_allocated_bytes) <= len(ALLOCATED_TERMS)


def test_an_optimizer_in_the_backward_never_holds_all_gradients():
    usual = memory(method="full", seq_len=64, optimizer="adamw-fused")
    freed = memory(method="full", seq_len=64, optimizer="adamw-fused", optimizer_in_backward=True)
    assert usual.phases["optimizer"] - usual.phases["save"] == pytest.approx(2 * MODEL.num_params, rel=0.01)
    assert freed.phases["optimizer"] - freed.phases["save"] < 0.5 * 2 * MODEL.num_params


SMALL_VOCABULARY = {**CONFIG, "vocab_size": 64}


def test_each_gradient_is_there_once():
    """With few tokens the backward ends with all gradients and next to nothing else."""
    spec = model_spec(SMALL_VOCABULARY)
    setup = TrainSetup(model=SMALL_VOCABULARY, method="full", seq_len=16, optimizer="adamw-fused")
    once = estimate_memory(setup, spec).phases
    assert 2 * spec.num_params <= once["backward"] - once["save"] <= 1.05 * 2 * spec.num_params


def test_a_second_micro_batch_makes_a_tensors_gradient_beside_all():
    spec = model_spec(SMALL_VOCABULARY)
    setup = TrainSetup(
        model=SMALL_VOCABULARY, method="full", seq_len=16, optimizer="adamw-fused", grad_accum_steps=2
    )
    twice, largest = estimate_memory(setup, spec).phases, 2 * 704 * 256
    assert twice["backward"] - twice["save"] >= 2 * spec.num_params + largest


def test_the_step_comes_when_only_ids_are_left_of_the_batch():
    for seq_len in (64, 4096):
        found = memory(method="full", optimizer="adamw-fused", seq_len=seq_len).phases
        assert found["optimizer"] - found["save"] == 2 * MODEL.num_params + 24 * seq_len


def test_workspaces_belong_to_the_card():
    plain = memory(seq_len=64)
    hopper = estimate_memory(TrainSetup(model=CONFIG, seq_len=64), MODEL, capability=(9, 0))
    assert plain.terms["workspace"] == 2 * CUBLAS_WORKSPACE_BYTES
    assert hopper.terms["workspace"] == 2 * CUBLAS_WORKSPACE_HOPPER_BYTES
    on_cpu = estimate_memory(TrainSetup(model=CONFIG, seq_len=64), MODEL, on_gpu=False)
    assert on_cpu.terms["workspace"] == 0


def test_grouped_heads_cost_the_square_of_the_length_before_ampere():
    setup = TrainSetup(model=CONFIG, weights_dtype="float16", autocast="float16", seq_len=4096)
    turing, ampere = (
        estimate_memory(setup, MODEL, capability=c).peak_allocated_bytes for c in ((7, 5), (8, 0))
    )
    assert turing - ampere > 4 * 8 * 4096 * 4096, "float32 weights of 8 heads"


def test_states_that_page_or_are_offloaded_are_in_host_memory():
    paged = memory(method="full", optimizer="paged-adamw", seq_len=64)
    plain = memory(method="full", optimizer="adamw-fused", weights_dtype="float32", seq_len=64)
    assert paged.host_bytes > 8 * 0.9 * MODEL.num_params
    assert plain.host_bytes < paged.host_bytes
    shape = {"method": "full", "seq_len": 64, "sharding": "fsdp", "num_gpus": 2}
    kept, moved = memory(**shape), memory(**shape, offload="optimizer")
    assert moved.host_bytes > kept.host_bytes
    assert moved.phases["save"] < kept.phases["save"]


@pytest.mark.parametrize("sharding", ["fsdp", "fsdp1"])
def test_fsdp_holds_whole_gradients_between_micro_batches(sharding):
    """Trainer runs all micro-batches but the last without exchange: on each rank, gradients stay as large as the model."""
    model = model_spec(CONFIG | {"num_hidden_layers": 16})
    recipe = {"method": "full", "weights_dtype": "bfloat16", "checkpointing": "full"}
    shape = {"micro_batch_size": 8, "seq_len": 1024, "sharding": sharding, "num_gpus": 8}
    setups = [TrainSetup(model=CONFIG, **recipe, **shape, grad_accum_steps=n) for n in (1, 4)]
    once, often = (estimate_memory(setup, model) for setup in setups)
    whole = 2 * model.num_params
    # At the highest moment of the single micro-batch a layer's gradients and the head's are whole anyway.
    ids = 3 * 24 * 8 * 1024
    assert 0.5 * whole < often.phases["backward"] - once.phases["backward"] <= whole + ids
    assert often.phases["optimizer"] == once.phases["optimizer"] + ids


@given(recipes, shapes)
def test_a_pair_of_answers_takes_what_two_rows_take(recipe, shape):
    """With all logits a row's log probability and its loss need the same."""
    shape = {**shape, "loss": "full"}
    pairs = estimate_memory(TrainSetup(objective="dpo", eval_batch_size=3, **recipe, **shape), MODEL)
    twice = {**shape, "micro_batch_size": 2 * shape["micro_batch_size"]}
    assert pairs == estimate_memory(TrainSetup(eval_batch_size=6, **recipe, **twice), MODEL)


def test_a_context_is_the_published_one_of_its_architecture() -> None:
    import doctest

    from planner import contexts
    from planner.catalog import find_gpu
    from planner.estimate import estimate
    from planner.specs import Machine

    assert doctest.testmod(contexts).failed == 0
    for gpu, (size, source) in {
        "t4": contexts.CONTEXTS[7, 5],
        "a100-80gb-sxm": contexts.CONTEXTS[8, 0],
    }.items():
        assert "GiB" in source
        setup = TrainSetup(model="smollm2-135m", weights_dtype="float16")
        answer = estimate(setup, Machine(gpu=find_gpu(gpu), num_gpus=1))
        assert answer.memory.terms["context"] == size
