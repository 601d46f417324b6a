"""plan(): what it returns fits, what the user fixed stays, the batch is what was asked, the gap is the real one."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.catalog import find_gpu
from planner.errors import DoesNotFitError, FinefitError, SetupError
from planner.estimate import estimate
from planner.gains import gains
from planner.hf_config import model_spec
from planner.lengths import DataLengths
from planner.search import DEFAULT_GLOBAL_BATCH, plan
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import GIB

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
MODEL = model_spec(CONFIG)
RTX_4090 = find_gpu("RTX 4090")


def machine(free_gib=24.0, num_gpus=1, gpu=RTX_4090):
    return Machine(gpu=gpu, num_gpus=num_gpus, free_bytes=round(free_gib * GIB))


def search(machine, global_batch=None, lengths=None, **wishes):
    return plan({"model": CONFIG, **wishes}, machine, global_batch=global_batch, lengths=lengths, model=MODEL)


wishes_of_users = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["lora", "qlora", "full"]),
        "optimizer": st.sampled_from(["adamw", "sgd", "adamw-8bit", "adafactor"]),
        "checkpointing": st.sampled_from(["full", "none"]),
        "loss": st.sampled_from(["full", "chunked", "fused"]),
        "weights_dtype": st.sampled_from(["bfloat16", "float32"]),
        "rank": st.sampled_from([8, 64]),
        "attention": st.sampled_from(["sdpa", "flash", "eager"]),
        "seq_len": st.sampled_from([512, 2048, 8192]),
        "micro_batch_size": st.integers(1, 8),
        "grad_accum_steps": st.integers(1, 8),
        "optimizer_in_backward": st.just(False),
        "max_grad_norm": st.sampled_from([0.3, 1.0]),
        "packing": st.booleans(),
    },
)


@settings(deadline=None, max_examples=60)
@given(wishes=wishes_of_users, free_gib=st.floats(0.5, 80), batch=st.none() | st.integers(1, 64))
def test_a_plan_fits_and_keeps_every_wish(wishes, free_gib, batch):
    try:
        found = search(machine(free_gib), batch, **wishes)
    except DoesNotFitError as error:
        assert error.short_by_bytes >= 0
        return
    except SetupError:
        assert wishes.get("packing") or wishes.get("attention") == "eager"
        return
    assert found.estimate.fit.verdict == "fits"
    for name, value in wishes.items():
        assert getattr(found.estimate.setup, name) == value
    again = estimate(found.estimate.setup, machine(free_gib), MODEL)
    assert again.memory == found.estimate.memory, "what is planned is what is estimated"


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 64),
    num_gpus=st.sampled_from([1, 2, 4]),
    fixed=st.sampled_from([{}, {"grad_accum_steps": 1}, {"grad_accum_steps": 4}, {"micro_batch_size": 2}]),
)
def test_the_global_batch_is_what_was_asked_where_it_can_be(batch, num_gpus, fixed):
    found = search(machine(80, num_gpus), batch, seq_len=256, **fixed).estimate.setup
    per_gpu = batch // num_gpus
    divides = batch % num_gpus == 0 and all(per_gpu % size == 0 for size in fixed.values())
    is_power = per_gpu & (per_gpu - 1) == 0
    can_be = divides and (fixed != {"grad_accum_steps": 1} or is_power) and per_gpu >= 1
    if can_be and per_gpu * 256 <= 16_384:
        assert found.global_batch_size == batch or ("grad_accum_steps" in fixed and not is_power)
    assert found.global_batch_size <= max(batch, num_gpus * found.grad_accum_steps, num_gpus * 2)


def test_the_usual_batch_where_none_is_asked():
    assert search(machine()).estimate.setup.global_batch_size == DEFAULT_GLOBAL_BATCH
    assert search(machine(), grad_accum_steps=4).estimate.setup.global_batch_size == DEFAULT_GLOBAL_BATCH
    assert search(machine(), micro_batch_size=2, grad_accum_steps=3).estimate.setup.global_batch_size == 6


@pytest.mark.parametrize(
    "wish",
    [
        {"optimizer": "sgd"},
        {"optimizer": "paged-adamw"},
        {"loss": "fused"},
        {"weights_dtype": "float32"},
        {"autocast": "bfloat16"},
        {"checkpointing": "selective"},
        {"quant": "nf4"},
        {"method": "full", "optimizer_in_backward": True, "max_grad_norm": None},
        {"method": "full", "weights_dtype": "float32", "autocast": None},
    ],
    ids=str,
)
def test_a_wish_that_the_search_wouldnt_choose_itself_is_a_wish(wish):
    setup = search(machine(), **wish).estimate.setup
    assert {name: getattr(setup, name) for name in wish} == wish


def test_a_smaller_micro_batch_is_tried_where_accumulated_gradients_need_room():
    """All gradients live through every micro-batch but a single one's forward: size 4 x 1 fits, 2 x 2 may not."""
    for free_gib in (x / 10 for x in range(60, 130)):
        try:
            found = search(machine(free_gib), 4, method="full", optimizer="adamw-8bit", checkpointing="full")
        except DoesNotFitError:
            continue
        sizes = [(1, 4), (2, 2), (4, 1)]
        fitting = [
            size
            for size, accumulation in sizes
            if estimate(
                found.estimate.setup.with_(micro_batch_size=size, grad_accum_steps=accumulation),
                machine(free_gib),
                MODEL,
            ).fit.verdict
            == "fits"
        ]
        assert found.estimate.setup.micro_batch_size in fitting


def test_contradicting_wishes_are_the_users_error():
    with pytest.raises(SetupError, match="optimizer_in_backward"):
        search(machine(), method="full", optimizer_in_backward=True, grad_accum_steps=2)
    with pytest.raises(SetupError, match="quant"):
        search(machine(), method="lora", quant="nf4")
    v100 = replace(RTX_4090, bf16=False, name="no bfloat16")
    with pytest.raises(SetupError, match="bfloat16"):
        search(machine(gpu=v100), weights_dtype="bfloat16")


def test_what_is_preferred_comes_first():
    def chosen(free_gib):
        setup = search(machine(free_gib), 1, seq_len=2048).estimate.setup
        return setup.method, setup.checkpointing

    assert chosen(24) == ("lora", "none")
    order = [("lora", "none"), ("lora", "full"), ("qlora", "none"), ("qlora", "full")]
    seen = []
    for free_gib in (24, 8, 6, 5, 4, 3.5, 3, 2.5, 2.2, 2, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4):
        try:
            seen.append(order.index(chosen(free_gib)))
        except DoesNotFitError:
            break
    assert seen == sorted(seen)
    assert seen[-1] > 0


@settings(deadline=None, max_examples=25)
@given(free_gib=st.floats(0.45, 3.0), method=st.sampled_from(["lora", "qlora", "full"]))
def test_the_gap_is_the_smallest_one(free_gib, method):
    """No candidate misses by less, and with that much more memory the nearest no longer misses."""
    try:
        search(machine(free_gib), 1, method=method, optimizer="adamw")
    except DoesNotFitError as error:
        short = error.short_by_bytes
    else:
        return
    gaps = []
    for checkpointing, loss, autocast in itertools.product(("none", "full"), ("full", "chunked"), (0, 1)):
        fields = {"checkpointing": checkpointing, "loss": loss, "method": method, "optimizer": "adamw"}
        if autocast:
            fields |= {"weights_dtype": "float32", "autocast": "bfloat16"}
        for in_backward in (False, True):
            if method == "full":
                fields |= {"optimizer_in_backward": in_backward, "max_grad_norm": None}
            for gained in ({}, gains({"model": CONFIG, "seq_len": 2048, **fields}, MODEL, RTX_4090)):
                setup = TrainSetup(model=CONFIG, seq_len=2048, **fields, **gained)
                gaps.append(-estimate(setup, machine(free_gib), MODEL).fit.headroom_bytes)
    assert short == max(0, min(gaps))
    roomier = replace(machine(free_gib), free_bytes=machine(free_gib).free_bytes + short)
    try:
        search(roomier, 1, method=method, optimizer="adamw")
    except DoesNotFitError as error:
        assert error.short_by_bytes == 0, "nothing is short any more, only tight"


def test_a_wish_chooses_the_recipe_that_was_composed_for_it():
    setup = search(machine(), method="full", weights_dtype="bfloat16").estimate.setup
    assert setup.autocast is None, "autocast belongs to the recipe with float32 weights"


def test_what_contradicts_a_wish_is_not_the_nearest():
    for wish in ({"grad_accum_steps": 4}, {"max_grad_norm": 1.0}):
        with pytest.raises(DoesNotFitError) as caught:
            search(machine(0.7), method="full", **wish)
        assert caught.value.short_by_bytes > 0
        assert "in the backward" not in str(caught.value)


def test_tight_is_not_enough():
    """Between what fits and what doesn't there are machines on which each candidate is tight."""
    was_tight = False
    for hundredths in range(60, 400, 2):
        try:
            found = search(machine(hundredths / 100), 1, method="lora", checkpointing="full", loss="full")
        except DoesNotFitError as error:
            was_tight |= error.short_by_bytes == 0
        else:
            assert found.estimate.fit.verdict == "fits"
    assert was_tight


def test_what_a_wish_rules_out_is_not_the_nearest():
    with pytest.raises(DoesNotFitError, match="nearest is qlora") as caught:
        search(machine(0.5), quant="nf4")
    assert caught.value.short_by_bytes > 0


def test_every_rejected_candidate_says_why():
    with pytest.raises(DoesNotFitError, match=r"nearest is .* short at 2048 tokens"):
        search(machine(0.6))
    found = search(machine(2))
    assert found.rejected
    for rejected in found.rejected:
        assert rejected.reason
        assert rejected.label
        assert rejected.short_by_bytes >= 0


class TestLengths:
    """The length of a sequence follows the rows."""

    @staticmethod
    def lengths(longest, mean):
        return DataLengths(
            num_rows=100, mean=mean, p50=round(mean), p99=longest, longest=longest, source="counted"
        )

    def test_it_holds_the_longest_row_rounded_up(self):
        found = search(machine(), lengths=self.lengths(longest=1000, mean=900)).estimate.setup
        assert (found.seq_len, found.packing) == (1024, False)

    def test_it_never_exceeds_what_the_model_knows(self):
        found = search(machine(80), 1, lengths=self.lengths(longest=20_000, mean=19_000))
        assert found.estimate.setup.seq_len == 8192
        assert any("20000" in reason for reason in found.reasons)

    def test_short_rows_are_packed_and_the_batch_keeps_its_rows(self):
        found = search(machine(), 16, lengths=self.lengths(longest=1024, mean=256)).estimate.setup
        assert found.packing
        assert found.global_batch_size == 4

    def test_packing_is_the_users_to_refuse(self):
        found = search(machine(), packing=False, lengths=self.lengths(longest=1024, mean=100)).estimate.setup
        assert not found.packing


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.sampled_from(sorted(TrainSetup.__dataclass_fields__)),
        st.none() | st.text(max_size=6) | st.integers() | st.booleans(),
        max_size=3,
    )
)
def test_any_wishes_give_a_plan_or_one_clear_error(wishes):
    try:
        found = plan({"model": CONFIG, **wishes}, machine())
    except FinefitError as error:
        assert str(error)
    else:
        assert found.estimate.fit.verdict == "fits"


def test_a_model_without_sdpa_is_planned_with_what_it_has():
    machine = Machine(gpu=find_gpu("a100-80gb"), num_gpus=1)
    assert plan({"model": "gemma-2-2b"}, machine).estimate.setup.attention == "flash"
    old = Machine(gpu=find_gpu("t4"), num_gpus=1)
    assert plan({"model": "gemma-2-2b", "seq_len": 512}, old).estimate.setup.attention == "eager"
    with pytest.raises(
        SetupError, match="attention: transformers has no sdpa for gemma-2-2b; use flash or eager"
    ):
        plan({"model": "gemma-2-2b", "attention": "sdpa"}, machine)
