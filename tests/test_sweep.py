"""Sweeps, the measuring protocol and what is seen of the computer meanwhile; no run, no torch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("numpy")

from hypothesis import given
from hypothesis import strategies as st

from bench.cli import run
from bench.host_sampler import HostSampler
from bench.jobs import FakeExecutor
from bench.protocol import StepProtocol
from bench.stats import summarise
from bench.store import read_results, setup_id
from bench.sweep import read_axes, rounds, sweep
from bench.timeline import MAX_POINTS, MIN_POINTS, thin
from planner.cli_options import Session
from planner.errors import SetupError, UsageError
from planner.planfile import write_plan
from planner.setup import TrainSetup
from planner.specs import GpuProfile, Machine
from planner.units import GIB

SETUP = TrainSetup(model="smollm2-135m", seq_len=64)
times = st.lists(st.floats(1e-3, 1e3), max_size=80)


@given(times)
def test_warm_up_and_measuring_end_within_their_caps(walls):
    protocol = StepProtocol()
    for is_enough, least, most in (
        (protocol.is_warm, protocol.min_warmup, protocol.max_warmup),
        (protocol.is_measured, protocol.min_steps, protocol.max_steps),
    ):
        assert not (is_enough(walls) and len(walls) < least)
        assert is_enough(walls) or len(walls) < most


def test_warm_up_goes_on_while_steps_get_faster():
    protocol = StepProtocol()
    assert not protocol.is_warm([9.0, 1.0]) and protocol.is_warm([9.0, 1.0, 0.99])
    assert not protocol.is_warm([9.0, 3.0, 2.0, 1.0])


def test_measuring_ends_by_spread_by_steps_or_by_seconds():
    protocol = StepProtocol()
    steady, noisy = [1.0] * 10, [1.0, 2.0] * 5
    assert protocol.is_measured(steady) and not protocol.is_measured(noisy)
    assert protocol.is_measured(noisy * 5) and protocol.is_measured([20 * t for t in noisy])
    assert summarise(noisy).relative_spread > protocol.max_spread
    fixed = StepProtocol.of(warmup=0, steps=3)
    assert fixed.is_warm([]) and not fixed.is_measured([1.0, 1.0]) and fixed.is_measured([1.0, 9.0, 1.0])


@given(
    st.lists(st.tuples(st.sampled_from(["forward", "loss"]), st.lists(st.integers(0, 2**50), max_size=600)))
)
def test_a_thinned_timeline_keeps_the_peak_of_each_kept_stretch(stretches):
    kept = thin(stretches)
    full = [(name, values) for name, values in stretches if values]
    if len(full) <= 24:
        assert [(name, max(values)) for name, values in kept] == [(name, max(v)) for name, v in full]
    assert sum(len(values) for _, values in kept) <= MAX_POINTS + MIN_POINTS * len(kept)


def test_a_sweep_is_every_combination_once_and_names_the_impossible_ones():
    axes = read_axes(["micro_batch_size=1,2,2", "seq-len=32,64"])
    found = sweep({"a.yaml": SETUP, "b.yaml": SETUP}, axes)
    assert [(c.setup.micro_batch_size, c.setup.seq_len) for c in found.cells] == [
        (1, 32),
        (1, 64),
        (2, 32),
        (2, 64),
    ]
    assert {c.plan for c in found.cells} == {"a.yaml"}
    assert found.cells[1].label == "a.yaml micro_batch_size=1 seq_len=64"
    impossible = sweep({"a": SETUP}, read_axes(["quant=none,nf4"]))
    assert len(impossible.cells) == 1 and "qlora" in impossible.skipped[0]
    with pytest.raises(SetupError, match="quant"):
        sweep({"a": SETUP}, read_axes(["quant=nf4"]))


@pytest.mark.parametrize(
    "words", [["seq_len"], ["seq_len="], ["sq_len=1"], ["seq_len=1", "seq-len=2"], ["seq_len=x"]]
)
def test_a_sweep_that_is_none_is_a_usage_error(words):
    with pytest.raises(UsageError):
        read_axes(words)


def test_too_many_runs_are_refused_before_any():
    words = [f"{name}={','.join(map(str, range(1, 60)))}" for name in ("rank", "seq_len", "micro_batch_size")]
    with pytest.raises(UsageError, match="205379"):
        sweep({"a": SETUP}, read_axes(words))


def test_repeats_go_round_by_round_without_what_is_done():
    cells = sweep({"a": SETUP}, read_axes(["seq_len=32,64"])).cells
    first, second = (cell.setup.seq_len for cell in cells)
    assert [c.setup.seq_len for c in rounds(cells, 2, {})] == [first, second] * 2
    done = Counter({setup_id(cells[0].setup): 1})
    assert [c.setup.seq_len for c in rounds(cells, 2, done)] == [second, first, second]


# ------------------------------------------------------------- the command, with the fake executor


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeExecutor:
    monkeypatch.chdir(tmp_path)
    executor = FakeExecutor(max_tokens=128)
    monkeypatch.setattr("bench.bench_command.ProcessExecutor", lambda **options: executor)
    monkeypatch.setattr("bench.cli_commands.require_train_extra", lambda command: None)
    write_plan(tmp_path / "plan.yaml", SETUP, "local", {})
    return executor


def machine(usable_bytes: int = 64 * GIB) -> Session:
    gpu = GpuProfile(
        name="cpu",
        vendor="test",
        architecture="test",
        backend="cpu",
        modelled=True,
        memory_bytes=usable_bytes,
        usable_bytes=usable_bytes,
    )
    return Session(local_machine=lambda: Machine(gpu=gpu, free_bytes=usable_bytes, is_local=True))


def bench(*words: str, usable_bytes: int = 64 * GIB) -> int:
    return run(["bench", "plan.yaml", *words, "--json"], machine(usable_bytes))


def test_an_out_of_memory_run_is_a_result_and_not_the_end_of_a_sweep(plan, capsys):
    assert bench("--sweep", "micro_batch_size=1,4,2", "seq_len=32,64") == 0
    found, warnings = read_results(Path("results.jsonl"))
    assert [r.outcome for r in found] == ["ok", "ok", "ok", "oom", "ok", "ok"] and warnings == []
    assert found[3].last_phase == "warmup"
    assert len({r.setup_id for r in found}) == 6
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [json.loads(json.dumps(r.to_json())) for r in found]


def test_resume_runs_what_is_missing_and_what_was_killed(plan, capsys):
    plan.outcomes = {"lora": "killed"}
    assert bench("--sweep", "micro_batch_size=1,2") == 1
    plan.outcomes = {}
    assert bench("--sweep", "micro_batch_size=2,1,4") == 0
    with Path("results.jsonl").open("a") as file:
        file.write('{"torn')
    before = len(plan.jobs)
    assert bench("--sweep", "micro_batch_size=1,2,4", "--repeat", "2", "--resume") == 0
    sizes = [job.setup.micro_batch_size for job in plan.jobs[before:]]
    assert sizes == [1, 2, 4]
    assert "cut off" in capsys.readouterr().err
    assert bench("--sweep", "micro_batch_size=1,2,4", "--repeat", "2", "--resume") == 0
    assert len(plan.jobs) == before + 3


def test_a_single_run_that_runs_out_of_memory_is_exit_3(plan):
    assert bench("--set", "seq_len=512") == 3


def test_what_is_predicted_not_to_fit_ends_one_run_and_skips_a_cell(plan, capsys):
    assert bench(usable_bytes=2**20) == 3
    assert bench("--sweep", "seq_len=32,64", usable_bytes=2**20) == 0
    assert plan.jobs == [] and capsys.readouterr().err.count("left out: plan.yaml seq_len") == 2


def test_a_sweep_ends_with_a_table_that_tells_its_runs_apart(plan, capsys):
    axes = ["--sweep", "micro_batch_size=1,4", "weights_dtype=float32,bfloat16"]
    assert run(["bench", "plan.yaml", *axes, "--set", "seq_len=64"], machine()) == 0
    captured = capsys.readouterr()
    assert "2/4 plan.yaml micro_batch_size=1 weights_dtype=bfloat16: steps" in captured.err
    rows = captured.out[captured.out.rindex("setup  ") :].splitlines()[2:]
    assert len(rows) == len(set(rows)) == 4
    assert "1 x 64 tokens, weights_dtype float32" in rows[0] and "oom" in rows[2]


def test_a_cell_that_can_t_be_predicted_is_named_and_the_sweep_goes_on(plan, capsys):
    assert bench("--sweep", "model=nowhere-7b,smollm2-135m") == 0
    assert "left out: plan.yaml model=nowhere-7b" in capsys.readouterr().err
    assert [job.setup.model for job in plan.jobs] == ["smollm2-135m"]
    assert bench("--set", "model=nowhere-7b") == 2


def test_runs_with_and_without_weights_are_different_runs_to_resume(plan):
    assert bench("--random-weights") == bench("--resume") == bench("--resume") == 0
    assert bench("--resume", "--random-weights") == 0
    assert [job.random_weights for job in plan.jobs] == [True, False]


def test_results_never_go_into_a_plan(plan):
    before = Path("plan.yaml").read_bytes()
    assert bench("--results", "./plan.yaml") == 2
    assert Path("plan.yaml").read_bytes() == before and plan.jobs == []


def test_axes_without_sweep_and_sweeps_without_a_plan_are_usage_errors(plan):
    assert run(["bench", "plan.yaml", "seq_len=1,2"]) == 2
    assert run(["bench", "seq_len=1,2", "--sweep", "rank=1"]) == 2
    assert plan.jobs == []


def test_the_interrupted_sweep_keeps_what_it_has(plan, monkeypatch, capsys):
    original = plan.run

    def interrupted(job, progress):
        if len(plan.jobs) == 2:
            raise KeyboardInterrupt
        return original(job, progress)

    monkeypatch.setattr(plan, "run", interrupted)
    assert bench("--sweep", "seq_len=16,32,64") == 130
    assert "2 results are in results.jsonl; --resume" in capsys.readouterr().err
    assert len(read_results(Path("results.jsonl"))[0]) == 2


# ------------------------------------------------------------- the computer meanwhile


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def host_files(
    *, busy: int, idle: int, steal: int = 0, job: int = 0, waited_ns: int = 1, faults: int = 0
) -> dict[str, str]:
    fields = " ".join(["0"] * 9 + [str(faults), "0", str(job), "0"])
    return {
        "proc/stat": f"cpu {busy} 0 0 {idle} 0 0 0 {steal} 0 0\n",
        "proc/7/stat": f"7 (a) b) {fields}\n",
        "proc/7/task/7/schedstat": f"5 {waited_ns} 3\n",
    }


def watch(root: Path, *states: dict[str, str]) -> HostSampler:
    now = [0.0]
    sampler = HostSampler(7, root, clock=lambda: now[0], own_cpu_s=lambda: 0.0)
    for files in states:
        write(root, files)
        now[0] += 10
        sampler.look(is_working=True)
    return sampler


def test_a_quiet_computer_raises_no_doubt(tmp_path):
    sampler = watch(tmp_path, host_files(busy=1000, idle=0), host_files(busy=2000, idle=1000, job=1000))
    assert sampler.facts()["others_cpu_share"] == 0 and sampler.doubts() == []


def test_steps_that_are_over_soon_are_watched_to_their_end(tmp_path):
    now = [0.0]
    sampler = HostSampler(7, tmp_path, clock=lambda: now[0], own_cpu_s=lambda: 0.0)
    for busy, is_working in ((0, False), (0, True), (30, False), (500, False)):
        write(tmp_path, host_files(busy=busy, idle=0, job=busy // 2))
        sampler.look(is_working=is_working)
        now[0] += 0.3
    assert sampler.facts()["others_cpu_share"] == pytest.approx(0.5)
    assert sampler.facts()["watched_s"] == pytest.approx(0.3) and "used 50%" in sampler.doubts()[0]


def test_the_processors_load_is_told_from_look_to_look(tmp_path):
    sampler = HostSampler(7, tmp_path)
    shares = []
    for busy, idle in ((0, 0), (300, 100), (300, 200), (500, 200)):
        write(tmp_path, host_files(busy=busy, idle=idle))
        shares.append(sampler.busy_share())
    assert shares == [None, 0.75, 0.0, 1.0]
    assert HostSampler(7, tmp_path / "nothing").busy_share() is None


def test_everything_that_disturbs_is_named(tmp_path):
    clocks = "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    throttles = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    energy = "sys/class/powercap/intel-rapl:0/energy_uj"
    before = {**host_files(busy=0, idle=0), clocks: "3000000", throttles: "4", energy: "5000000"}
    after = host_files(busy=1500, idle=400, steal=100, job=500, waited_ns=2 * 10**9, faults=5000)
    sampler = watch(tmp_path, before, {**after, clocks: "2000000", throttles: "6", energy: "905000000"})
    facts = sampler.facts()
    assert facts["others_cpu_share"] == pytest.approx(0.5) and facts["steal_share"] == pytest.approx(0.05)
    assert facts["min_cpu_clock_hz"] == 2e9 and facts["cpu_throttles"] == 2 and facts["cpu_energy_j"] == 900
    doubts = " ".join(sampler.doubts())
    for words in (
        "used 50% of the processors",
        "hypervisor",
        "no processor for 29%",
        "throttled 2",
        "5000 pages",
        "2.0 GHz",
    ):
        assert words in doubts


def test_what_a_system_does_not_have_is_unknown_and_no_doubt(tmp_path):
    sampler = watch(tmp_path, {}, {})
    assert set(sampler.facts().values()) <= {None, 10.0} and sampler.doubts() == []
