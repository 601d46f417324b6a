"""One setup on one machine: verdict and probability, laws of setup and machine, what is said about the answer."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import api
from planner.catalog import find_gpu
from planner.conformal import predict
from planner.errors import NotModelledError, SetupError
from planner.estimate import Estimator, estimate, usable_memory
from planner.hf_config import model_spec
from planner.pressure import overheads
from planner.residuals import published_runs
from planner.results import PHASES, TERMS, Memory
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.uncertainty import FAILS_FROM, FITS_BELOW, LEVEL, Uncertainty, verdict
from planner.units import GIB

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
MODEL = model_spec(CONFIG)
RTX_4090, T4 = find_gpu("RTX 4090"), find_gpu("T4")
CPU = replace(RTX_4090, name="CPU", backend="cpu")


def needing(allocated, fragmentation=0, context=0):
    terms = dict.fromkeys(TERMS, 0) | {
        "weights": allocated,
        "fragmentation": fragmentation,
        "context": context,
    }
    phases = dict.fromkeys(PHASES, allocated // 2) | {"loss": allocated}
    return Memory(phases=phases, terms=terms, peak_phase="loss", host_bytes=0, disk_bytes=0)


def judged(allocated, usable, fragmentation=0, context=0, **options):
    return Uncertainty(TrainSetup(model=CONFIG), **options).judge(
        needing(allocated, fragmentation, context), usable
    )


class TestJudge:
    """From a peak and what there is to a probability and a word."""

    @given(st.integers(1, 2**36), st.integers(0, 2**34), st.integers(1, 2**37), st.integers(0, 2**33))
    def test_more_room_never_makes_it_likelier_to_fail(self, allocated, fragmentation, usable, more):
        less_room, more_room = (judged(allocated, u, fragmentation) for u in (usable, usable + more))
        assert 0.0 <= more_room.probability <= less_room.probability + 1e-12 <= 1.0 + 2e-12
        assert abs(more_room.headroom_bytes - less_room.headroom_bytes - more) <= 1, (
            "half a byte may be rounded"
        )

    @given(st.integers(1, 2**36), st.integers(1, 2**37), st.integers(0, 2**33))
    def test_a_higher_peak_never_makes_it_likelier_to_fit(self, allocated, usable, more):
        assert judged(allocated + more, usable).probability >= judged(allocated, usable).probability

    @given(st.floats(0, 1))
    def test_the_word_follows_the_probability(self, probability):
        word = verdict(probability)
        assert (word == "fits") == (probability <= FITS_BELOW)
        assert (word == "does-not-fit") == (probability >= FAILS_FROM)
        assert word in ("fits", "tight", "does-not-fit")

    def test_the_edges_belong_to_the_outer_words(self):
        assert verdict(FITS_BELOW) == "fits"
        assert verdict(FAILS_FROM) == "does-not-fit"
        assert verdict(0.25) == "tight"

    def test_the_error_of_the_peak_decides_where_nothing_is_lost(self):
        """On a CPU without fragmentation: three equal errors of 10 %, none below; the rest of the mass unseen."""
        errors = predict([[[0.0], [0.1], [0.2]]])
        usable = round(10 * GIB * math.exp(0.15))
        found = judged(10 * GIB, usable, on_gpu=False, errors=errors)
        assert found.probability == pytest.approx(errors.above(0.15)) == pytest.approx(1 / 6 + 1 / 4)
        assert found.verdict == "tight"
        assert found.headroom_bytes == usable - round(10 * GIB * math.exp(0.1))

    def test_what_the_allocator_loses_is_added_to_the_peak(self):
        exact = predict([[[0.0]] * 1000])
        lost = overheads(TrainSetup(model=CONFIG), needing(10 * GIB), on_gpu=True)
        assert 0 < lost[0] < lost[-1] < 5 * GIB
        assert judged(10 * GIB, 10 * GIB + lost[-1] + 1, errors=exact).verdict == "fits"
        assert judged(10 * GIB, 10 * GIB + lost[0] - 1, errors=exact).probability > 0.99
        between = judged(10 * GIB, 10 * GIB + lost[len(lost) // 2] + 1, errors=exact)
        assert 0.3 < between.probability < 0.6

    def test_the_context_is_taken_off(self):
        with_context, without = (judged(10 * GIB, 20 * GIB, context=c) for c in (5, 0))
        assert with_context.usable_bytes == without.usable_bytes - 5


class TestInterval:
    """The interval of the allocated peak."""

    def test_is_the_errors_quantiles_rounded_outwards(self):
        errors = predict([[[-0.02]] * 30 + [[0.05]] * 30])
        memory = needing(1_000_000)
        found = Uncertainty(TrainSetup(model=CONFIG), errors=errors).interval(memory)
        assert found.low_peak_allocated_bytes == 980_000, "exp(-0.02) is 0.9802"
        assert found.high_peak_allocated_bytes == 1_052_000, "exp(0.05) is 1.0513"

    def test_is_open_where_nothing_was_seen(self):
        found = Uncertainty(TrainSetup(model=CONFIG), errors=predict([])).interval(needing(10))
        assert found.low_peak_allocated_bytes is None
        assert found.high_peak_allocated_bytes is None

    def test_stands_in_the_json_beside_the_peak(self):
        answer = estimate(TrainSetup(model=CONFIG), Machine(gpu=RTX_4090), MODEL).to_json()["memory"]
        low, high = answer["low_peak_allocated_bytes"], answer["high_peak_allocated_bytes"]
        assert low <= answer["peak_allocated_bytes"] * 1.5
        assert low < high
        assert answer["interval_level"] == LEVEL

    def test_says_whose_errors_it_was_learnt_from(self):
        traced = Uncertainty(TrainSetup(model=CONFIG), source="trace").note
        assert ("errors of the closed form" in traced) is not bool(published_runs("trace"))

    def test_says_whether_such_runs_were_published(self):
        known = TrainSetup(model=CONFIG, method="lora")
        unknown = TrainSetup(model=CONFIG, method="full", num_gpus=2, sharding="zero3")
        assert "no published run" not in Uncertainty(known).note
        assert "no published run of this kind" in Uncertainty(unknown).note


def test_the_estimate_says_what_it_assumed_in_the_contracts_shape():
    setup = TrainSetup(model=CONFIG, method="qlora", seq_len=4096, num_gpus=2, sharding="fsdp")
    answer = json.loads(json.dumps(estimate(setup, Machine(gpu=RTX_4090, num_gpus=2), MODEL).to_json()))
    assert answer["schema_version"] == 1
    assert answer["gpu"] == "RTX 4090:2"
    assert answer["setup"] == setup.to_dict()
    memory = answer["memory"]
    allocated = sum(memory["terms"][t] for t in TERMS[:7])
    assert memory["peak_allocated_bytes"] == allocated
    assert memory["peak_reserved_bytes"] == allocated + memory["terms"]["fragmentation"]
    assert memory["device_used_bytes"] == memory["peak_reserved_bytes"] + memory["terms"]["context"]
    assert any("nf4-double base" in text for text in answer["assumptions"])
    assert any("fragmentation" in text for text in answer["not_modelled"])
    assert not any("ZeRO" in text for text in answer["not_modelled"])
    assert any("2048" in text for text in answer["warnings"]), "longer than the model was trained for"


def test_another_batch_of_an_estimator_is_the_estimate_of_that_setup():
    machine = Machine(gpu=RTX_4090)
    estimator = Estimator(TrainSetup(model=CONFIG, seq_len=512), machine, MODEL)
    for batch, seq_len in ((1, 512), (4, 512), (2, 1024), (1, 512)):
        setup = TrainSetup(model=CONFIG, micro_batch_size=batch, seq_len=seq_len)
        assert estimator.at(batch, seq_len) == estimate(setup, machine, MODEL)
        assert estimator.verdict(batch, seq_len) == estimate(setup, machine, MODEL).fit.verdict


def test_what_is_free_now_counts_before_what_the_card_could_give():
    assert usable_memory(Machine(gpu=RTX_4090, free_bytes=123)) == (123, "free now on this machine")
    usable, source = usable_memory(Machine(gpu=RTX_4090))
    assert 0.9 * RTX_4090.memory_bytes < usable <= RTX_4090.memory_bytes
    assert source


@pytest.mark.parametrize(
    ("field", "gpu", "changes"),
    [
        ("weights_dtype", T4, {}),
        ("weights_dtype", T4, {"weights_dtype": "float32", "autocast": "bfloat16"}),
        ("attention", T4, {"weights_dtype": "float16", "autocast": "float16", "attention": "flash"}),
        ("kernels", CPU, {"kernels": "liger", "weights_dtype": "float32"}),
        ("loss", CPU, {"loss": "fused", "weights_dtype": "float32"}),
        ("num_gpus", RTX_4090, {"num_gpus": 2, "sharding": "fsdp"}),
        (
            "optimizer_in_backward",
            RTX_4090,
            {"method": "full", "optimizer_in_backward": True, "weights_dtype": "float16"},
        ),
    ],
    ids=str,
)
def test_a_law_of_setup_and_machine_names_its_field(field, gpu, changes):
    with pytest.raises(SetupError) as caught:
        estimate(TrainSetup(model=CONFIG, **changes), Machine(gpu=gpu), MODEL)
    assert caught.value.field == field


def test_no_rules_no_number():
    with pytest.raises(NotModelledError, match="not modelled"):
        estimate(TrainSetup(model=CONFIG), Machine(gpu=replace(RTX_4090, modelled=False)), MODEL)


def test_a_loss_that_takes_the_head_itself_needs_unscaled_logits():
    scaled = {**CONFIG, "model_type": "granite", "logits_scaling": 8.0}
    machine = Machine(gpu=RTX_4090)
    with pytest.raises(SetupError, match="logits_scaling") as caught:
        estimate(TrainSetup(model=scaled, loss="chunked"), machine, model_spec(scaled))
    assert caught.value.field == "loss"
    unscaled = {**scaled, "logits_scaling": 1.0}
    assert estimate(TrainSetup(model=unscaled, loss="chunked"), machine, model_spec(unscaled))
    assert estimate(TrainSetup(model=scaled), machine, model_spec(scaled))


def test_objectives_need_their_architecture():
    bert = {
        "model_type": "bert",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "vocab_size": 99,
    }
    with pytest.raises(SetupError, match="decoder"):
        estimate(TrainSetup(model=bert), Machine(gpu=RTX_4090), model_spec(bert))


def test_time_has_an_interval_and_grows_with_the_micro_batches():
    machine = Machine(gpu=RTX_4090)
    known = estimate(TrainSetup(model=CONFIG, method="full"), machine, MODEL).time
    assert known.low_step_s <= known.step_s <= known.high_step_s
    twice = estimate(TrainSetup(model=CONFIG, method="full", grad_accum_steps=2), machine, MODEL).time
    assert known.step_s < twice.step_s < 2.2 * known.step_s


@pytest.mark.parametrize("model", ["gemma-2-2b", "gpt-j-6b"])
def test_attention_that_is_left_open_is_one_that_the_model_has(model):
    assert api.estimate(model, gpu="rtx-4090").setup.attention == "flash"
    half = {"weights_dtype": "float16", "autocast": "float16"}
    assert api.estimate(model, gpu="v100-32gb-sxm2", **half).setup.attention == "eager"
    with pytest.raises(SetupError, match="no sdpa"):
        api.estimate(model, gpu="rtx-4090", attention="sdpa")
