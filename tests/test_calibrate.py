"""Corrections of a machine's rates, learnt from its own results."""

import json
import math
import random
from dataclasses import replace

import pytest

pytest.importorskip("numpy")

from bench.calibrate import MIN_SETUPS, calibrate, keep
from bench.cli import run as finefit
from bench.host import Cpu, HostMemory
from bench.machine import cpu_machine
from bench.store import Measured, Measurement, Samples, append_result
from planner import rates as rates_module
from planner.calibration import TERMS, calibration_file, corrected, read_calibration
from planner.errors import DataError, FinefitError, UsageError
from planner.estimate import estimate
from planner.rates import Rates, flat
from planner.setup import TrainSetup

MACHINE = replace(
    cpu_machine(
        Cpu(
            model="Some Processor",
            vendor="x",
            architecture="x86_64",
            features=("amx_bf16",),
            num_cpus=2,
            num_logical_cpus=2,
        ),
        HostMemory(available_bytes=2**36, total_bytes=2**36),
    ),
    is_local=True,
)
RATES = Rates(
    matmul={2: flat(4e11), 4: flat(1e11)},
    attention={2: flat(5e10), 4: flat(5e10)},
    memory_bytes_per_s=1e10,
    optimizer_bytes_per_s=1e10,
    dequantise_bytes_per_s=5e9,
    launch_s=0.0,
    kernel_s=2e-5,
    source="a test",
)
TRUTH = {"products, 16 bits": 1.3, "optimizer": 2.5, "attention, 16 bits": 0.6}


@pytest.fixture(autouse=True)
def measured_machine(tmp_path, monkeypatch):
    """A machine whose rates are known, in a data folder of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    path = rates_module.machine_file(MACHINE.gpu)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema_version": 1, "rates": RATES.to_json()}))
    for cache in (rates_module.local_rates, read_calibration):
        cache.cache_clear()
    yield path
    for cache in (rates_module.local_rates, read_calibration):
        cache.cache_clear()


def setups():
    sizes = ((256, 4, 512), (512, 8, 128), (1024, 2, 1024))
    for hidden, layers, seq_len in sizes:
        config = {
            "_name_or_path": f"llama-{hidden}",
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "vocab_size": 8000,
        }
        for method in ("full", "lora"):
            for rows in (1, 4):
                yield TrainSetup(
                    model=config, from_scratch=True, method=method, micro_batch_size=rows, seq_len=seq_len
                )


def step_s(setup, factors):
    """The step's time on a machine whose rates are off by these factors."""
    path = rates_module.machine_file(MACHINE.gpu)
    before = path.read_text()
    path.write_text(json.dumps({"schema_version": 1, "rates": corrected(RATES, factors).to_json()}))
    rates_module.local_rates.cache_clear()
    found = estimate(setup, MACHINE).time.step_s
    path.write_text(before)
    rates_module.local_rates.cache_clear()
    return found


def result(setup, seconds, **environment):
    tokens = setup.micro_batch_size * setup.seq_len
    return Measurement(
        id="r",
        time_utc="2026-11-22T10:00:00Z",
        setup=setup,
        gpu="cpu",
        device="cpu",
        environment={"cpu_model": "Some Processor", **environment},
        outcome="ok",
        samples=Samples(step_wall_s=(seconds,), step_cpu_s=(seconds,), step_tokens=(tokens,)),
        measured=Measured(step_s=seconds, step_spread=0.01),
    )


@pytest.fixture
def results():
    return [result(setup, step_s(setup, TRUTH)) for setup in setups()]


def test_each_term_gets_back_what_it_is_off_by(results):
    learnt = calibrate(results, MACHINE)
    found = learnt.calibration.corrections
    for name, factor in TRUTH.items():
        assert found[name].factor == pytest.approx(factor, rel=0.15), name
    assert found["pointwise operations"].factor == pytest.approx(1.0, abs=0.15)
    # What no setup spends time on keeps its rate.
    assert "4-bit weights" not in found and "links" not in found
    assert learnt.calibration.error_after < learnt.calibration.error_before / 2


def test_a_setup_is_judged_by_what_others_taught(results):
    odd = replace(results[0], measured=replace(results[0].measured, step_s=50 * results[0].measured.step_s))
    rows = calibrate([odd, *results[1:]], MACHINE).rows
    clean = calibrate(results[1:], MACHINE)
    assert rows[0].measured_s == odd.measured.step_s
    assert rows[0].after == pytest.approx(rows[0].before, abs=0.05)
    assert clean.calibration.error_after < 0.1


def test_plans_for_this_machine_use_what_was_learnt(results):
    setup = next(iter(setups()))
    before = estimate(setup, MACHINE).time
    path = keep(calibrate(results, MACHINE), MACHINE)
    assert path == str(calibration_file(MACHINE))
    after = estimate(setup, MACHINE).time
    truth = step_s(setup, TRUTH)
    assert abs(after.step_s - truth) < abs(before.step_s - truth) / 2
    assert after.low_step_s < truth < after.high_step_s
    other = estimate(setup, replace(MACHINE, is_local=False))
    assert other.time is None or other.time.step_s != after.step_s


def test_rates_measured_anew_are_not_corrected_by_old_results(results, measured_machine):
    keep(calibrate(results, MACHINE), MACHINE)
    setup = next(iter(setups()))
    faster = corrected(RATES, dict.fromkeys(TERMS, 0.5))
    measured_machine.write_text(json.dumps({"schema_version": 1, "rates": faster.to_json()}))
    rates_module.local_rates.cache_clear()
    assert estimate(setup, MACHINE).time.step_s == pytest.approx(step_s(setup, dict.fromkeys(TERMS, 0.5)))


def test_results_without_a_pattern_are_refused():
    chance = random.Random(7)
    for _ in range(2):
        noise = [result(s, step_s(s, {}) * math.exp(chance.gauss(0, 0.3))) for s in setups()]
        with pytest.raises(FinefitError, match="nothing is kept"):
            keep(calibrate(noise, MACHINE), MACHINE)
    assert not calibration_file(MACHINE).exists()


def test_too_few_setups_are_refused(results):
    with pytest.raises(FinefitError, match=f"{MIN_SETUPS} are needed"):
        calibrate(results[: MIN_SETUPS - 1] * 5, MACHINE)


def test_doubtful_results_are_left_out_and_counted(results):
    short = replace(results[1], samples=replace(results[1].samples, step_tokens=(5,)))
    shaky = replace(results[2], measured=replace(results[2].measured, step_spread=0.4))
    disturbed = result(results[0].setup, 99.0, others_cpu_share=0.5)
    failed = replace(results[3], outcome="oom")
    learnt = calibrate([*results, short, shaky, disturbed, failed], MACHINE)
    assert sum(learnt.left_out.values()) == 4
    assert len(learnt.left_out) == 4
    assert learnt.calibration.num_results == len(results)


def test_another_machine_s_results_are_refused(results):
    foreign = result(results[0].setup, 1.0, cpu_model="Another")
    with pytest.raises(UsageError, match="Another"):
        calibrate([*results, foreign], MACHINE)


def test_a_broken_file_is_named():
    calibration_file(MACHINE).write_text('{"corrections": {"no such term": {}}}')
    with pytest.raises(DataError, match="delete it"):
        estimate(next(iter(setups())), MACHINE)


def test_the_command_keeps_and_draws_it(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.cli_calibrate.machine_of", lambda session, device: MACHINE)
    path, page = tmp_path / "results.jsonl", tmp_path / "calibration.md"
    for one in results:
        append_result(path, one)
    assert finefit(["calibrate", str(path), "--dry-run", "--json", "--md", str(page)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["is_supported"] and len(answer["rows"]) == len(results)
    assert not calibration_file(MACHINE).exists()
    assert "mean error" in page.read_text()
    assert finefit(["calibrate", str(path)]) == 0
    output = capsys.readouterr()
    assert "optimizer" in output.out and str(calibration_file(MACHINE)) in output.err
