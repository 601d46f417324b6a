"""Time of a step: what operations do, the roofline over it, its interval, and how it does on published runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner import rates as rates_module
from planner.blocks import layer_work
from planner.catalog import find_gpu
from planner.cli_accuracy import accuracy_command
from planner.errors import DataError
from planner.estimate import Estimator, estimate
from planner.hf_config import model_spec
from planner.memory import machine_facts, memory_model
from planner.rates import Curve, Rates, class_name, flat, rates_of, stack_kind
from planner.setup import TrainSetup
from planner.sizes import evaluate
from planner.specs import Machine
from planner.speed_accuracy import compare, summaries
from planner.throughput import TimeModel
from planner.timing import Kind, distribution, project_of, published_errors, ratios

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "evidence" / "throughput-runs.jsonl"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
MODEL = model_spec(CONFIG)
A100 = Machine(gpu=find_gpu("a100-80gb-sxm"))
RATES = Rates(
    matmul={2: flat(1e14), 4: flat(1e13)},
    attention={2: flat(5e13), 4: flat(5e13)},
    memory_bytes_per_s=1e12,
    optimizer_bytes_per_s=1e12,
    dequantise_bytes_per_s=5e11,
    launch_s=1e-5,
    link_bytes_per_s=1e11,
    network_bytes_per_s=1e10,
    host_bytes_per_s=1e10,
    host_step_bytes_per_s=1e10,
    source="a test",
)


def setup_of(**changes):
    return TrainSetup(**{"model": CONFIG, "attention": "flash", "seq_len": 1024, **changes})


def run_of(model=MODEL, **changes):
    return memory_model(setup_of(**changes), model, **machine_facts(A100)).run


def timer(rates=RATES, **changes):
    return TimeModel(run_of(**changes), rates)


def seconds(rates=RATES, batch=4, length=1024, **changes):
    return timer(rates, **changes).at(batch, length).seconds.total


def product_flops(work, tokens=1, length=1):
    return sum(m.count * evaluate(m.flops, tokens, length) for m in work.matmuls)


class TestWork:
    def test_each_weight_is_multiplied_and_added_once_for_each_token(self):
        run = run_of(method="full")
        work = layer_work(MODEL.layers[0], MODEL.hidden_size, run.recipe)
        weights = sum(m.num_weights for m in MODEL.layers[0].matrices)
        assert product_flops(work.forward) == 2 * weights
        assert product_flops(work.backward) == 4 * weights

    def test_frozen_weights_have_no_gradient_and_adapters_do(self):
        layer, rank = MODEL.layers[0], 8
        work = layer_work(layer, MODEL.hidden_size, run_of(rank=rank).recipe)
        weights = sum(m.num_weights for m in layer.matrices)
        adapters = sum(rank * (m.in_features + m.out_features) for m in layer.matrices)
        assert product_flops(work.forward) == 2 * (weights + adapters)
        assert product_flops(work.backward) == 2 * weights + 4 * adapters

    def test_the_first_layer_of_a_frozen_model_passes_no_gradient_on(self):
        recipe = run_of(checkpointing="none", targets=["down_proj"]).recipe
        first = layer_work(MODEL.layers[0], MODEL.hidden_size, recipe, is_first=True)
        later = layer_work(MODEL.layers[0], MODEL.hidden_size, recipe)
        assert product_flops(first.backward) < product_flops(later.backward) / 10

    def test_a_checkpoint_stops_where_nothing_more_is_saved(self):
        work = layer_work(MODEL.layers[0], MODEL.hidden_size, run_of(method="full").recipe)
        assert 0.5 * product_flops(work.forward) < product_flops(work.again) < product_flops(work.forward)

    @pytest.mark.parametrize("stack", [None, "transformers 4.48.1"])
    def test_experts_take_the_time_of_those_that_are_chosen(self, stack):
        config = {**CONFIG, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
        model = model_spec(config, experts_as_linears=stack is not None)
        run = run_of(model, method="full", stack=stack)
        work = layer_work(model.layers[0], model.hidden_size, run.recipe)
        active = sum(m.num_weights * m.token_share for m in model.layers[0].matrices)
        assert product_flops(work.forward) == pytest.approx(2 * active)
        assert product_flops(work.backward) == pytest.approx(4 * active)

    def test_both_stacks_of_an_encoder_decoder_are_counted(self):
        config = {
            "model_type": "t5",
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_heads": 8,
            "vocab_size": 32128,
        }
        config |= {"num_layers": 6, "num_decoder_layers": 6, "feed_forward_proj": "relu"}
        model = model_spec(config)
        run = run_of(model, method="full", objective="seq2seq", attention="eager", checkpointing="none")
        kinds = TimeModel(run, RATES)._kinds(1024, 512)
        weights = sum(layer.count * m.num_weights for layer in model.layers for m in layer.matrices)
        flops = sum(k.count * product_flops(k.work.forward, 1, 0) for k in kinds if k.is_layer)
        assert flops == pytest.approx(2 * weights)

    def test_a_fused_kernel_leaves_out_what_the_mask_hides(self):
        whole = timer(attention="flash")
        kinds = whole._kinds(4096, 1024)
        assert kinds[0].share(1024) == pytest.approx(0.5)
        assert replace(kinds[0], window=128).share(1024) == pytest.approx((128 - 8) / 1024)
        assert replace(kinds[0], causal=False).share(1024) == 1.0


class TestRoofline:
    def test_a_step_takes_what_limits_it(self):
        step = timer(method="full").at(4, 1024).seconds
        assert step.total == step.compute + step.memory + step.communication + step.launch
        assert step.compute > step.memory > 0 == step.communication

    def test_checkpointing_length_and_quantisation_cost_time(self):
        assert seconds(checkpointing="full") > seconds(checkpointing="none")
        assert seconds(batch=1, length=4096) > seconds(batch=4, length=1024)
        assert seconds(method="qlora") > seconds(method="lora", adapter_dtype="bfloat16")
        assert seconds(loss="full", attention="eager") > seconds(loss="full")

    def test_small_batches_are_bound_by_their_launches(self):
        slow = replace(RATES, launch_s=1e-4)
        assert timer(slow).at(1, 16).seconds.launch > 0.5 * timer(slow).at(1, 16).seconds.total
        assert seconds(slow, 1, 16) == pytest.approx(seconds(slow, 1, 32), rel=0.05)

    def test_ranks_pay_for_what_they_exchange(self):
        alone = seconds(method="full")
        several = {"num_gpus": 8, "method": "full"}
        for sharding in ("ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1"):
            assert timer(sharding=sharding, **several).at(4, 1024).seconds.communication > 0
        far = seconds(sharding="ddp", num_nodes=2, **several)
        assert far > seconds(sharding="ddp", **several) > 0.9 * alone
        hidden = replace(RATES, overlap=1.0)
        assert seconds(hidden, sharding="ddp", **several) < seconds(sharding="ddp", **several)

    def test_a_rate_that_nobody_knows_is_named(self):
        unknown = replace(RATES, link_bytes_per_s=None)
        assert timer(unknown, num_gpus=2, sharding="ddp").unknown == "link"
        assert timer(unknown, num_gpus=2, sharding="device_map").unknown is None
        assert timer(unknown).unknown is None

    def test_a_curve_is_interpolated_between_its_points(self):
        curve = Curve(((1e6, 1.0), (1e8, 3.0)))
        assert [curve.at(size) for size in (1.0, 1e6, 1e7, 1e9)] == [1.0, 1.0, 2.0, 3.0]


class TestRates:
    def test_a_card_without_runs_gets_the_nearest_class_and_a_wider_interval(self):
        setup = setup_of()
        known, far = estimate(setup, A100, MODEL), estimate(setup, Machine(gpu=find_gpu("mi300x")), MODEL)
        assert any("none of" in words and "class" in words for words in far.assumptions)
        assert not any("none of" in words for words in known.assumptions)
        assert far.time.high_step_s / far.time.low_step_s > known.time.high_step_s / known.time.low_step_s

    def test_without_a_peak_the_time_is_unknown_and_never_zero(self):
        blank = Machine(gpu=replace(A100.gpu, flops={}))
        found = estimate(setup_of(), blank, MODEL)
        assert found.time is None
        assert any("time unknown" in words for words in found.assumptions)

    def test_halved_rates_are_a_class_of_their_own(self):
        assert class_name(find_gpu("rtx-4090")) == "sm_89 half-rate"
        assert class_name(find_gpu("rtx-6000-ada")) == "sm_89"

    def test_stacks_are_told_apart(self):
        assert stack_kind(None) == stack_kind("transformers 4.48.1, torch 2.4") == "fine-tuning"
        assert stack_kind("llm-foundry, torch 2.1") == "pretraining"
        assert stack_kind("nemo 25, megatron") == "vendor"

    def test_a_measured_machine_comes_before_its_class(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        path = rates_module.machine_file(A100.gpu)
        path.parent.mkdir()
        path.write_text(json.dumps({"schema_version": 1, "rates": RATES.to_json()}))
        local = replace(A100, is_local=True)
        rates_module.local_rates.cache_clear()
        try:
            assert rates_of(local, setup_of()).rates == RATES
            assert rates_of(A100, setup_of()).rates != RATES
            path.write_text("{}")
            rates_module.local_rates.cache_clear()
            with pytest.raises(DataError, match="machine"):
                rates_of(local, setup_of())
        finally:
            rates_module.local_rates.cache_clear()


class TestIntervals:
    def test_more_sources_narrow_them(self):
        kind = Kind(hardware="sm_80", stack="fine-tuning", method="lora", is_shared=False, bound="device")
        rows = published_errors()
        low, high = distribution(rows, kind, is_own=True).interval(0.9)
        few = [row for row in rows if row.project == rows[0].project]
        wide_low, wide_high = distribution(few, kind, is_own=True).interval(0.9)
        assert wide_low < low < 0 < high < wide_high
        assert ratios(kind, True)[0] < 1 < ratios(kind, True)[1]

    def test_a_project_is_what_publishes(self):
        assert project_of("https://github.com/a/b/issues/1") == "a/b"


@pytest.fixture(scope="module")
def published():
    return summaries(compare([json.loads(line) for line in RUNS.read_text().splitlines()]))


@pytest.mark.skipif(not RUNS.is_file(), reason="the published runs lie in the repository only")
class TestEvidence:
    def test_no_class_and_method_with_ten_runs_is_off_by_more_than_15_percent(self, published):
        large = {group: one.median for group, one in published.items() if one.num_runs >= 10}
        assert len(large) >= 9
        assert max(large.values()) <= 0.15

    def test_intervals_hold_for_sources_that_were_left_out(self, published):
        held = sum(one.num_held for one in published.values())
        assert held >= 600
        assert 0.85 <= sum(one.covered for one in published.values()) / held <= 0.95

    def test_the_committed_report_is_what_the_code_says(self, monkeypatch):
        monkeypatch.chdir(ROOT)
        words = ["evidence/throughput-runs.jsonl", "--speed", "--markdown", "--worst", "20"]
        result = CliRunner().invoke(accuracy_command, words, standalone_mode=False)
        assert result.output == (ROOT / "reports" / "throughput.md").read_text(), "run: make reports"


def test_times_of_a_search_are_made_from_what_setups_share():
    machine = Estimator(setup_of(), A100, MODEL)
    times = [machine.at(batch, 1024).time for batch in (1, 2, 4)]
    assert times[0].tokens_per_s < times[1].tokens_per_s <= times[2].tokens_per_s * 1.05
    assert sum(times[2].bound.values()) == pytest.approx(times[2].step_s)
