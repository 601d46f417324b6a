"""Measuring: what becomes of a job in a child process, whatever happens to it, and what the record says."""

from __future__ import annotations

import gc
import io
import os
import platform
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest

pytest.importorskip("numpy")

from bench import nvml_fakes
from bench.compare import predicted_vs_measured
from bench.jobs import FakeExecutor, Job, Progress, RunReport
from bench.measure import ProgressLine, find_doubts, measure
from bench.nvml import CardLoad, CardProcess
from bench.process import ProcessExecutor
from bench.protocol import StepProtocol
from bench.sampler import INTERVAL_S, GpuSampler
from bench.store import Samples, read_results
from planner.errors import FinefitError
from planner.setup import TrainSetup
from planner.units import GIB

# Whoever else uses the machine that runs the tests.
OTHERS = ("other programs", "no processor", "hypervisor", "clock went", "throttled", "read back")

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
SETUP = TrainSetup(model=TINY, from_scratch=True, seq_len=64, micro_batch_size=2, optimizer="adamw-fused")
JOB = Job(setup=SETUP, protocol=StepProtocol.of(warmup=1, steps=3))
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def ignore(step: Progress) -> None:
    pass


def run_script(script: str, *, job: Job = JOB, progress=ignore, nvml=None) -> RunReport:
    """The report of a child that runs `script` in place of the worker; `say` reports an event there."""
    preamble = """
        import json, os, pathlib, signal, sys, time
        folder = pathlib.Path(sys.argv[1])
        out = (folder / "events.jsonl").open("a")
        def say(event, **values):
            print(json.dumps({"event": event, **values}), file=out, flush=True)
        def step(wall_s=0.5):
            say("step", wall_s=wall_s, cpu_s=0.4, num_tokens=128, loss=2.0)
    """
    code = textwrap.dedent(preamble) + textwrap.dedent(script)
    executor = ProcessExecutor(nvml=nvml or nvml_fakes.missing_driver(), command=(sys.executable, "-c", code))
    return executor.run(job, progress)


WHOLE_RUN = """
    say("phase", name="start")
    say("device", device="cpu", num_threads=2)
    say("memory", baseline_host_bytes=100)
    say("phase", name="warmup"); step(9.0)
    say("phase", name="steps"); step(0.5); step(0.4); step(0.6)
    say("memory", peak_allocated_bytes=1000, phases={"backward": 1000})
    say("note", text="a doubt")
    time.sleep(0.3)
    say("phase", name="done")
"""


def test_a_whole_run_is_reported():
    seen: list[Progress] = []
    report = run_script(WHOLE_RUN, progress=seen.append)
    assert report.outcome == "ok" and report.error is None and report.last_phase == "done"
    assert report.samples.warmup_wall_s == (9.0,) and report.samples.step_wall_s == (0.5, 0.4, 0.6)
    assert report.samples.step_tokens == (128, 128, 128)
    assert report.measured.peak_allocated_bytes == 1000 and report.measured.phases == {"backward": 1000}
    assert report.measured.host_bytes > 2**20
    assert report.device == "cpu" and report.environment["num_threads"] == 2
    assert [note for note in report.notes if not any(word in note for word in OTHERS)] == ["a doubt"]
    steps = [p for p in seen if p.phase == "steps"]
    assert [p.num_done for p in steps] == [0, 1, 2, 3] and {p.num_all for p in steps} == {3}


@pytest.mark.parametrize(
    ("ending", "outcome", "words"),
    [
        ("raise SystemExit(7)", "crash", "exit code 7"),
        ("sys.exit(0)", "crash", "before it was done"),
        ("say('error', is_oom=True, text='CUDA out of memory'); sys.exit(1)", "oom", "CUDA out of memory"),
        ("say('error', is_oom=False, text='no such file'); sys.exit(1)", "crash", "no such file"),
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", "killed", "SIGKILL", marks=POSIX),
        pytest.param("os.kill(os.getpid(), signal.SIGTERM)", "killed", "SIGTERM", marks=POSIX),
        pytest.param("os.kill(os.getpid(), signal.SIGSEGV)", "crash", "SIGSEGV", marks=POSIX),
        pytest.param("os.kill(os.getpid(), signal.SIGABRT)", "crash", "SIGABRT", marks=POSIX),
    ],
)
def test_an_end_before_the_end_keeps_what_was_measured(ending, outcome, words):
    script = f"""
        say("phase", name="steps"); step(0.25)
        print("last words", file=sys.stderr, flush=True)
        {ending}
    """
    report = run_script(script)
    assert report.outcome == outcome and words in report.error and "\n" not in report.error
    assert report.last_phase == "steps" and report.samples.step_wall_s == (0.25,)
    assert "last words" in report.stderr_tail


def test_the_systems_out_of_memory_killer_is_told_from_other_kills(monkeypatch):
    counts = iter([4, 5])
    monkeypatch.setattr("bench.process.count_oom_kills", lambda root: next(counts))
    report = run_script("os.kill(os.getpid(), signal.SIGKILL)")
    assert report.outcome == "oom" and "memory ran out" in report.error


def test_a_torn_event_and_no_event_at_all_are_no_trouble():
    assert (
        run_script("say('phase', name='load'); out.write('{\"event\": \"st'); out.flush()").last_phase
        == "load"
    )
    assert run_script("(folder / 'events.jsonl').unlink()").outcome == "crash"


@POSIX
def test_timeout_ends_the_child_and_its_children(tmp_path):
    script = f"""
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
        say("phase", name="load")
        time.sleep(600)
    """
    report = run_script(script, job=replace(JOB, timeout_s=2.0))
    assert report.outcome == "timeout" and report.last_phase == "load"
    wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())))


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return status.strip().startswith("Z") or not status.strip()


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@POSIX
def test_ctrl_c_ends_the_child_and_reaches_the_caller(tmp_path):
    script = f"""
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
        say("phase", name="load")
        time.sleep(600)
    """

    def interrupt(step: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_script(script, progress=interrupt)
    wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_record_is_appended_whatever_the_outcome(tmp_path):
    path = tmp_path / "runs" / "results.jsonl"
    executor = FakeExecutor(outcomes={"qlora": "oom", "full": "timeout"})
    for method in ("lora", "qlora", "full"):
        measure(
            SETUP.with_(method=method),
            protocol=StepProtocol.of(steps=6),
            results_path=path,
            executor=executor,
            gpu="cpu",
        )
    found, warnings = read_results(path)
    assert [m.outcome for m in found] == ["ok", "oom", "timeout"] and warnings == []
    assert found[0].measured.step_s and not found[1].measured.step_s
    assert found[1].error == "fake oom" and len({m.id for m in found}) == 3
    assert found[0].environment["cpu_model"] and found[0].environment["versions"]
    assert [job.protocol.max_steps for job in executor.jobs] == [6, 6, 6]


def test_a_results_file_that_cannot_be_written_is_found_before_the_run(tmp_path):
    (tmp_path / "file").touch()
    executor = FakeExecutor()
    for path in (tmp_path / "file" / "r.jsonl", tmp_path):
        with pytest.raises(FinefitError, match="can't write"):
            measure(SETUP, results_path=path, executor=executor)
    assert executor.jobs == []


def test_record_carries_the_prediction_beside_the_measurement():
    tokens = SETUP.tokens_per_micro_batch
    predicted = {"memory": {"peak_allocated_bytes": tokens * 1100}, "time": None, "source": "analytic"}
    record = measure(SETUP, executor=FakeExecutor(noise=0), predicted=predicted)
    (row,) = predicted_vs_measured([record])
    assert row.quantity == "peak_allocated_bytes" and row.relative_error == pytest.approx(0.1)
    assert record.measured.tokens_per_s == pytest.approx(1 / 1e-4)


def doubts(times: tuple[float, ...], *, device="cpu", gpu="local", outcome="ok", load=0.0, notes=()) -> str:
    report = RunReport(outcome=outcome, device=device, samples=Samples(step_wall_s=times), notes=notes)
    return "\n".join(find_doubts(report, gpu, load))


def test_doubts_are_named_and_only_where_there_is_one():
    steady = (1.0, 1.01, 1.0, 0.99, 1.0, 1.0)
    assert doubts(steady) == ""
    assert "only 3" in doubts(steady[:3])
    assert "spread by" in doubts((1.0, 1.5, 1.0, 1.5, 1.0, 1.5))
    assert "slower" in doubts((1.0, 1.0, 1.0, 1.2, 1.2, 1.2))
    assert "CPU seconds" in doubts(steady, load=1.5) and "load" not in doubts(steady, load=None)
    assert (
        "rtx-4090" in doubts(steady, gpu="rtx-4090") and doubts(steady, gpu="rtx-4090", device="cuda") == ""
    )
    assert doubts((1.0, 9.0), outcome="oom", notes=("x",)) == "x"


def sampler_of(nvml, pid: int) -> tuple[GpuSampler, list[float]]:
    now = [0.0]
    sampler = GpuSampler(nvml, pid, clock=lambda: now[0])
    return sampler, now


def with_process(card, pid: int, used_bytes: int | None, load=CardLoad()):  # noqa: B008
    shown = () if used_bytes is None else (CardProcess(pid=pid, used_bytes=used_bytes),)
    return replace(nvml_fakes.busy(card, used_bytes or 5 * GIB), processes=shown, load=load)


def test_sampler_keeps_the_extremes_of_its_own_process():
    nvml = nvml_fakes.FakeNvml([nvml_fakes.RTX_3060, nvml_fakes.RTX_4090])
    sampler, now = sampler_of(nvml, pid=7)
    sampler.watch("4090")
    hot = CardLoad(temperature_c=88, clock_hz=1e9, power_w=450.0, throttling=("power cap",))
    for used, load in ((3, CardLoad(temperature_c=50, clock_hz=2e9)), (9, hot), (4, CardLoad())):
        card = with_process(nvml_fakes.RTX_4090, 7, used * GIB, load)
        nvml.cards = [nvml_fakes.RTX_3060, card]
        sampler._handle = card
        sampler.look(is_working=True)
        now[0] += INTERVAL_S
    assert sampler.device_used_bytes == 9 * GIB
    assert sampler.facts() == {
        "driver": nvml.driver,
        "max_temperature_c": 88,
        "min_clock_hz": 1e9,
        "max_power_w": 450.0,
        "mean_power_w": None,
    }
    assert sampler.doubts() == ["the card was slowed down by: power cap"]


def test_sampler_falls_back_to_growth_and_counts_strangers():
    nvml = nvml_fakes.FakeNvml([nvml_fakes.RTX_4090])
    sampler, _ = sampler_of(nvml, pid=7)
    sampler.watch("GPU-4090")
    sampler._handle = nvml.cards[0]
    nvml.cards = [with_process(nvml_fakes.RTX_4090, 99, 2 * GIB)]
    sampler._handle = nvml.cards[0]
    sampler.look(is_working=False)
    assert sampler.device_used_bytes == 2 * GIB
    assert any("1 other process" in line for line in sampler.doubts())
    assert any("growth" in line for line in sampler.doubts())


def test_sampler_survives_a_dying_driver_and_looks_rarely():
    nvml = nvml_fakes.FakeNvml([nvml_fakes.RTX_4090])
    sampler, now = sampler_of(nvml, pid=7)
    sampler.watch("4090")
    sampler.look(is_working=True)
    nvml.failures = {("memory", 0): "GpuIsLost"}
    sampler.look(is_working=True)
    assert sampler.problem is None, "looked before it was due"
    now[0] += INTERVAL_S
    sampler.look(is_working=True)
    assert "GpuIsLost" in sampler.doubts()[-1]
    unknown, _ = sampler_of(nvml_fakes.busy_card(), pid=7)
    unknown.watch("no such card")
    unknown.look(is_working=True)
    assert unknown.device_used_bytes is None and unknown.doubts() == []


def test_a_cards_facts_come_only_with_a_run_on_it():
    script = WHOLE_RUN.replace('device="cpu", num_threads=2', 'device="cuda", gpu_uuid="4090", num_threads=2')
    script = script.replace('say("phase", name="done")', 'time.sleep(0.5); say("phase", name="done")')
    on_card = run_script(script, nvml=nvml_fakes.busy_card())
    assert on_card.device == "cuda" and "max_temperature_c" in on_card.environment
    assert {"at_s", "phase", "rss_bytes", "device_bytes", "num_other_processes"} <= set(on_card.watched)
    assert "gpu_uuid" not in on_card.environment
    assert any("other process" in note for note in on_card.notes)
    assert "max_temperature_c" not in run_script(WHOLE_RUN, nvml=nvml_fakes.busy_card()).environment


def test_progress_line_is_one_line_per_phase_without_a_terminal():
    stream = io.StringIO()
    show = ProgressLine(label="x: ", stream=stream)
    for step in (
        Progress(phase="load"),
        Progress(phase="steps", num_done=1, num_all=2),
        Progress(phase="steps"),
    ):
        show(step)
    assert stream.getvalue().splitlines() == ["x: load", "x: steps"]


def test_job_survives_the_way_to_the_worker(tmp_path):
    job = Job(setup=SETUP.with_(targets=("q_proj",)), device="cpu", timeout_s=3.0, parent_pid=5)
    job.write(tmp_path)
    assert Job.read(tmp_path) == job


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


real = [pytest.mark.train, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class TestRealRuns:
    pytestmark = real

    def test_a_tiny_model_is_measured(self, tmp_path):
        path = tmp_path / "r.jsonl"
        record = measure(
            SETUP, protocol=StepProtocol.of(warmup=2, steps=5), device="cpu", results_path=path, timeout_s=240
        )
        assert record.outcome == "ok", record.stderr_tail
        assert len(record.samples.step_wall_s) == 5 and len(record.samples.warmup_wall_s) == 2
        assert set(record.samples.step_tokens) == {SETUP.tokens_per_micro_batch}
        measured = record.measured
        phases = {"load", "forward", "loss", "backward", "optimizer", "eval", "save"}
        assert set(measured.phases) == phases
        assert measured.peak_allocated_bytes >= max(measured.phases.values())
        assert measured.phases["load"] < measured.phases["backward"] < measured.device_used_bytes
        assert 0 < measured.baseline_host_bytes < measured.device_used_bytes <= measured.host_bytes
        assert read_results(path) == ([record], [])
        along = [max(values) for _, values in record.timeline]
        assert [name for name, _ in record.timeline] == ["forward", "loss", "backward", "optimizer"]
        assert max(along) == max(
            measured.phases[name] for name in ("forward", "loss", "backward", "optimizer")
        )
        terms = measured.terms
        assert terms["optimizer"] == pytest.approx(2 * terms["gradients"], rel=0.01)
        assert terms["gradients"] == terms["adapters"]
        assert terms["weights"] + terms["adapters"] == pytest.approx(measured.phases["load"], rel=0.02)
        assert measured.eval_s > 0 and measured.save_s > 0 and measured.first_step_s > 0
        assert record.watched["rss_bytes"] and record.protocol["ended_by"] == "steps"

    @pytest.mark.skipif(
        platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory"
    )
    def test_freed_memory_stays_with_the_process_as_it_does_in_a_run(self):
        """Logits of 64 MiB are larger than what malloc keeps when nobody asks it to."""
        setup = SETUP.with_(model={**TINY, "vocab_size": 4096}, seq_len=512, micro_batch_size=8)
        record = measure(setup, protocol=StepProtocol.of(warmup=2, steps=2), device="cpu", timeout_s=240)
        assert record.outcome == "ok", record.stderr_tail
        assert 64 * 2**20 < record.measured.freed_bytes < record.measured.device_used_bytes

    def test_data_of_the_plan_counts_real_tokens_only(self, tmp_path):
        pytest.importorskip("tokenizers")
        data = tmp_path / "d.jsonl"
        rows = ['{"text": "%s"}' % ("a b c d " * n) for n in (2, 5, 9, 3, 4, 6)]
        data.write_text("\n".join(rows) + "\n")
        setup = SETUP.with_(data=str(data), objective="pretrain", tokenizer=str(word_tokenizer(tmp_path)))
        record = measure(setup, protocol=StepProtocol.of(warmup=2, steps=2), device="cpu", timeout_s=240)
        assert record.outcome == "ok", record.stderr_tail
        samples = record.samples
        assert all(0 < n < SETUP.tokens_per_micro_batch for n in samples.step_tokens)
        assert all(0 < n < m for n, m in zip(samples.step_trained_tokens, samples.step_tokens, strict=True))

    def test_a_plan_that_cannot_run_is_a_record_with_one_line(self):
        record = measure(
            SETUP.with_(attention="flash"),
            protocol=StepProtocol.of(warmup=2, steps=1),
            device="cpu",
            timeout_s=240,
        )
        assert record.outcome == "crash" and record.error.startswith("attention: flash needs CUDA")
        assert record.last_phase == "start"

    def test_an_allocation_that_fails_is_out_of_memory(self):
        huge = {**TINY, "max_position_embeddings": 2**20}
        setup = SETUP.with_(model=huge, seq_len=400_000, attention="eager", checkpointing="none")
        record = measure(setup, protocol=StepProtocol.of(warmup=2, steps=1), device="cpu", timeout_s=240)
        assert record.outcome == "oom", (record.outcome, record.error, record.stderr_tail)
        assert record.last_phase == "warmup"

    def test_a_killed_worker_leaves_its_steps(self):
        pids: list[int] = []
        # Python's own helper processes outlive the tests that needed them
        others = set(children_of(os.getpid()))

        def kill_after_two_steps(step: Progress) -> None:
            if step.phase == "steps" and step.num_done == 2 and not pids:
                (pid,) = set(children_of(os.getpid())) - others
                pids.append(pid)
                os.kill(pid, signal.SIGKILL)

        record = measure(
            SETUP,
            protocol=StepProtocol.of(warmup=2, steps=100_000),
            device="cpu",
            progress=kill_after_two_steps,
            timeout_s=240,
        )
        assert record.outcome == "killed" and record.last_phase == "steps"
        assert len(record.samples.step_wall_s) >= 2 and record.measured.step_s > 0

    def test_an_orphaned_worker_ends_itself(self, tmp_path):
        replace(JOB, protocol=StepProtocol.of(steps=100_000), device="cpu", parent_pid=1).write(tmp_path)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "bench.worker", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 1 and "is gone" in done.stderr

    def test_the_parent_imports_no_torch(self):
        code = "import bench.measure, bench.verify, bench.machine, sys; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"


def children_of(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children()]


def word_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.train
class TestLiveTensors:
    def test_counts_storages_once_and_forgets_them(self):
        import torch

        from bench.meters import LiveTensors

        live = LiveTensors()
        with live:
            a = torch.zeros(1000)
            b = a.view(10, 100)
            c = a + 1
            assert live.live_bytes == 8000
            del c
        assert live.live_bytes == 4000 and live.peak_bytes() == 8000
        del a
        assert live.live_bytes == 4000
        del b
        assert live.live_bytes == 0

    def test_phases_keep_their_own_peaks(self):
        import torch

        from bench.meters import LiveTensors, PhaseMeter

        live = LiveTensors()
        meter = PhaseMeter(live)
        with live:
            with meter("forward"):
                x = torch.zeros(1000)
                del x
            between = torch.zeros(5000)
            del between
            with meter("backward"):
                y = torch.zeros(250)
            with meter("forward"):
                z = torch.zeros(500)
        assert meter.phases == {"forward": 4000, "backward": 1000}
        assert meter.peak_bytes == 20_000
        del y, z

    def test_agrees_with_the_allocators_own_account(self):
        """torch's profiler sees each allocation of the CPU's allocator, also those inside of kernels."""
        import torch

        from bench.build import build_model
        from bench.meters import LiveTensors
        from bench.optim import build_optimizer
        from bench.step import TrainStep

        torch.set_num_threads(1)
        setup = SETUP.with_(method="full", checkpointing="none", seq_len=256)
        model = build_model(setup)
        step = TrainStep(setup, model, build_optimizer(setup, model))
        ids = torch.randint(0, 256, (2, 256))
        batch = [{"input_ids": ids, "labels": ids.clone()}]
        step(batch, num_items=510)
        live = LiveTensors()
        live.add(gc.get_objects())
        before = live.live_bytes
        with live:
            step(batch, num_items=510)
        assert live.live_bytes == before
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            step(batch, num_items=510)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        assert live.peak_bytes() - before == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "random_weights", "expected"),
    [
        ({"model": "smollm2-135m"}, False, False),
        ({"model": "smollm2-135m"}, True, True),
        ({"model": "smollm2-135m", "from_scratch": True, "method": "full"}, False, False),
        ({"model": "smollm2-135m", "from_scratch": True, "method": "qlora"}, False, True),
    ],
)
def test_what_random_weights_take_while_they_are_made_is_no_runs(changes, random_weights, expected):
    assert Job(setup=TrainSetup(**changes), random_weights=random_weights).has_stand_ins is expected
