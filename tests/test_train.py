"""A run from plan to adapter: what it leaves, how it stops and resumes, what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench import checkpoint, exam, loss, position, run
from bench.checkpoint import newest_checkpoint
from bench.divergence import Divergence
from bench.step import TrainStep
from bench.train import train
from planner.errors import DataError, FinefitError, InterruptedRunError, SetupError, UsageError
from planner.planfile import read_plan
from planner.setup import TrainSetup
from tiny_llama import CONFIG, write_rows
from whole_runs import (
    NUM_STEPS,
    assert_equal_runs,
    interrupted,
    make_plan,
    metrics,
    quiet_train,
    stop_at,
    summary_of,
)

pytestmark = pytest.mark.train


def test_lora_run_leaves_all_that_it_promises(
    plan: Callable[..., TrainSetup], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setup = plan()
    summary = quiet_train(setup, tmp_path / "run", eval_every_steps=4)
    assert capfd.readouterr().out == "", "stdout is for data"
    folder = tmp_path / "run"
    names = {p.name for p in folder.iterdir()} - {".lock"}
    assert names == {"plan.yaml", "metrics.jsonl", "checkpoints", "adapter", "summary.json"}
    assert read_plan(folder / "plan.yaml").setup == setup
    assert [entry["step"] for entry in metrics(folder)] == list(range(1, NUM_STEPS + 1))
    assert [entry["step"] for entry in metrics(folder, "eval")] == [0, 4, NUM_STEPS]
    assert metrics(folder)[-1]["loss"] < metrics(folder)[0]["loss"] - 0.5
    assert summary.eval_after["loss"] < summary.eval_before["loss"] - 0.5
    assert summary.eval_after["num_trained_tokens"] == summary.eval_before["num_trained_tokens"] > 0
    assert summary.to_json() == summary_of(folder)
    assert summary.num_tokens == sum(entry["tokens"] for entry in metrics(folder))
    assert [s["prompt"] for s in summary.sample_before] == [s["prompt"] for s in summary.sample_after]
    assert summary.sample_before != summary.sample_after
    assert summary.measured["step_s"] > 0
    assert summary.versions["torch"] == torch.__version__


def test_adapter_loads_with_peft_and_gives_the_same_logits(
    plan: Callable[..., TrainSetup], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    import transformers

    trained: list[Any] = []
    original = run.Run.execute

    def keep(self: run.Run) -> None:
        original(self)
        trained.append(self.model)

    monkeypatch.setattr(run.Run, "execute", keep)
    quiet_train(plan(targets=("q_proj", "down_proj"), rank=4), tmp_path / "run")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    token_ids = torch.tensor([[5, 6, 7, 8, 9]])
    before = base(input_ids=token_ids).logits
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    logits = loaded(input_ids=token_ids).logits
    assert torch.equal(logits, trained[0].eval()(input_ids=token_ids).logits)
    assert not torch.equal(logits, before)
    assert loaded.peft_config["default"].base_model_name_or_path == str(tiny / "model")


def test_full_run_leaves_a_model_that_loads(plan: Callable[..., TrainSetup], tmp_path: Path) -> None:
    import transformers

    setup = plan(method="full", weights_dtype="bfloat16", master_weights="float32", max_grad_norm=None)
    summary = quiet_train(setup, tmp_path / "run")
    assert summary.artifact == "model"
    assert summary.eval_after["loss"] < summary.eval_before["loss"] - 0.5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "qlora", "weights_dtype": "bfloat16"},
        {"method": "qlora", "weights_dtype": "bfloat16", "quant": "int8", "adapter_dtype": "bfloat16"},
        {"method": "lora", "packing": True, "loss": "chunked", "micro_batch_size": 1},
        {"method": "lora", "objective": "pretrain", "eval_batch_size": 3},
        {"method": "lora", "autocast": "bfloat16", "weights_dtype": "bfloat16", "checkpointing": "full"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_recipes_run_and_learn(
    plan: Callable[..., TrainSetup], tmp_path: Path, changes: dict[str, Any]
) -> None:
    summary = quiet_train(plan(**changes), tmp_path / "run")
    assert summary.eval_after["loss"] < summary.eval_before["loss"] - 0.2


def test_an_inline_config_starts_from_scratch(
    plan: Callable[..., TrainSetup], tiny: Path, tmp_path: Path
) -> None:
    setup = plan(model=CONFIG, tokenizer=str(tiny / "model"), from_scratch=True, method="full", max_steps=2)
    assert quiet_train(setup, tmp_path / "run").artifact == "model"


def test_nothing_held_out(plan: Callable[..., TrainSetup], tmp_path: Path) -> None:
    summary = quiet_train(plan(eval_fraction=0.0, max_steps=2), tmp_path / "run")
    assert summary.eval_before is None
    assert summary.sample_after, "prompts come from the training rows then"


RESUMED = [
    {"dropout": 0.2, "schedule": "cosine", "warmup_steps": 3},
    {"method": "full", "weight_decay": 0.1},
    {"method": "full", "weights_dtype": "bfloat16", "master_weights": "float32"},
    {"method": "full", "optimizer": "adamw-8bit"},
    {"method": "full", "optimizer": "adafactor"},
    {"method": "full", "optimizer_in_backward": True, "grad_accum_steps": 1},
    {"method": "qlora", "weights_dtype": "bfloat16", "optimizer": "lion"},
    {"autocast": "float16"},
    {"objective": "dpo", "data": "pairs.jsonl", "dropout": 0.2},
]


@pytest.mark.parametrize("changes", RESUMED, ids=lambda changes: "-".join(map(str, changes.values())))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    setup = plan(**changes)
    quiet_train(setup, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, run.Run, "_record", 5)
        with pytest.raises(InterruptedRunError, match=f"after step 5 of {NUM_STEPS}"):
            quiet_train(setup, tmp_path / "cut")
    assert quiet_train(setup, tmp_path / "cut").resumed_from == 5
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


MOMENTS = {
    "first evaluation": (run, "evaluate", 1, 0),
    "first sample": (exam, "sample_answers", 1, 0),
    "first micro-batch of a step": (TrainStep, "micro_step", 7, 3),
    "last micro-batch of a step": (TrainStep, "micro_step", 8, 4),
    "evaluation on the way": (run, "evaluate", 2, 4),
    "save": (position, "save_checkpoint", 1, 3),
    "last evaluation": (run, "evaluate", 3, NUM_STEPS),
}


@pytest.fixture(scope="module")
def evaluated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an evaluation on the way that nothing interrupted."""
    folder = tmp_path_factory.mktemp("evaluated") / "whole"
    quiet_train(make_plan(tiny, dropout=0.2), folder, eval_every_steps=4)
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_is_obeyed_at_every_moment(
    plan: Callable[..., TrainSetup],
    evaluated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    owner, name, call, step = MOMENTS[moment]
    setup = plan(dropout=0.2)
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, call)
        with pytest.raises(InterruptedRunError) as caught:
            quiet_train(setup, tmp_path / "cut", eval_every_steps=4)
    assert caught.value.exit_code == 33
    assert f"SIGTERM after step {step} of" in str(caught.value)
    quiet_train(setup, tmp_path / "cut", eval_every_steps=4)
    assert_equal_runs(evaluated, tmp_path / "cut")
    assert [e["step"] for e in metrics(tmp_path / "cut", "eval")] == [0, 4, NUM_STEPS]


def test_handlers_come_back(plan: Callable[..., TrainSetup], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    quiet_train(plan(max_steps=1), tmp_path / "run")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_stop_that_cannot_be_saved_exits_with_143(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    stop_at(monkeypatch, run.Run, "_record", 1)
    with pytest.raises(FinefitError, match=r"SIGTERM.*No space left") as caught:
        quiet_train(plan(), tmp_path / "run")
    assert caught.value.exit_code == 143


CHILD = """
import sys
from pathlib import Path
from bench.train import train
from planner.errors import FinefitError
from planner.planfile import read_plan
try:
    train(read_plan(Path(sys.argv[1])), Path(sys.argv[2]), progress=False, save_every_steps=int(sys.argv[3]))
except FinefitError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start_child(plan_file: Path, folder: Path, save_every_steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(plan_file), str(folder), str(save_every_steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = (
            (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
        )
        if sum('"kind": "step"' in line for line in lines) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"the child took no {step} steps: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a longer run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("long") / "whole"
    quiet_train(make_plan(tiny, dropout=0.2, max_steps=40), folder, save_every_steps=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_real_signal_and_a_resume_give_the_uninterrupted_run(
    whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    setup = read_plan(whole / "plan.yaml").setup
    process = start_child(whole / "plan.yaml", tmp_path / "cut", 1)
    wait_for_step(process, tmp_path / "cut", 4)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert (process.returncode, f"stopped by {number.name} after step" in said) == (33, True), said
    summary = quiet_train(setup, tmp_path / "cut", save_every_steps=1)
    assert summary.resumed_from is not None
    assert 3 <= summary.resumed_from < 40
    assert_equal_runs(whole, tmp_path / "cut")


def test_a_torn_checkpoint_costs_only_its_own_steps(
    plan: Callable[..., TrainSetup],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup = interrupted(plan, tmp_path / "cut", monkeypatch)
    os.truncate(tmp_path / "cut/checkpoints/step-000005/weights.safetensors", 100)
    summary = quiet_train(setup, tmp_path / "cut")
    assert summary.resumed_from == 3
    assert "step-000005 is torn" in summary.notes[0]
    assert "step-000005 is torn" in capsys.readouterr().err
    quiet_train(setup, tmp_path / "whole")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_an_interrupted_run_s_folder_can_be_moved(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = interrupted(plan, tmp_path / "here", monkeypatch)
    (tmp_path / "here").rename(tmp_path / "there")
    files = [path for path in (tmp_path / "there/checkpoints").rglob("*") if path.is_file()]
    assert not [path for path in files if str(tmp_path / "here").encode() in path.read_bytes()]
    assert quiet_train(setup, tmp_path / "there").resumed_from == 5


def test_without_a_whole_checkpoint_the_run_starts_again(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = interrupted(plan, tmp_path / "cut", monkeypatch)
    for folder in (tmp_path / "cut/checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    summary = quiet_train(setup, tmp_path / "cut")
    assert summary.resumed_from is None
    assert "starts again" in " ".join(summary.notes)
    quiet_train(setup, tmp_path / "whole")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_is_not_run_again(plan: Callable[..., TrainSetup], tmp_path: Path) -> None:
    setup = plan(max_steps=2)
    first = quiet_train(setup, tmp_path / "run")
    written = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert quiet_train(setup, tmp_path / "run") == first
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == written


def test_a_changed_plan_is_refused_with_the_difference(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = interrupted(plan, tmp_path / "run", monkeypatch)
    changed = setup.with_(learning_rate=5e-3, max_steps=10)
    with pytest.raises(UsageError, match=r"learning_rate: 0\.01 -> 0\.005; max_steps: 8 -> 10"):
        quiet_train(changed, tmp_path / "run")
    summary = quiet_train(changed, tmp_path / "run", allow_changes=True)
    assert (summary.resumed_from, summary.num_steps) == (5, 10)
    assert "learning_rate" in summary.notes[0]
    assert read_plan(tmp_path / "run" / "plan.yaml").setup == changed


def test_changed_data_is_refused(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 40)

    def own_data(**changes: Any) -> TrainSetup:
        return plan(data=str(rows), **changes)

    setup = interrupted(own_data, tmp_path / "run", monkeypatch)
    write_rows(rows, 41)
    with pytest.raises(FinefitError, match=r"rows\.jsonl is not what it was"):
        quiet_train(setup, tmp_path / "run")


def test_a_folder_that_is_something_else_is_left_alone(
    plan: Callable[..., TrainSetup], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        quiet_train(plan(), file)
    with pytest.raises(FinefitError, match="can't write in"):
        quiet_train(plan(), file / "below")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"no run of finefit \(it holds thesis\.tex\)"):
        quiet_train(plan(), foreign)
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    assert file.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(plan: Callable[..., TrainSetup], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(FinefitError, match="can't write in"):
        quiet_train(plan(), locked / "run")


def test_resume_false_insists_on_a_new_folder(plan: Callable[..., TrainSetup], tmp_path: Path) -> None:
    quiet_train(plan(max_steps=1), tmp_path / "run", resume=False)
    with pytest.raises(UsageError, match="holds a run already"):
        quiet_train(plan(max_steps=1), tmp_path / "run", resume=False)


def test_two_processes_never_share_a_folder(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = interrupted(plan, tmp_path / "run", monkeypatch)
    holder = f"""
import fcntl, sys
lock = open({str(tmp_path / "run" / ".lock")!r}, "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(UsageError, match="another finefit process"):
        quiet_train(setup, tmp_path / "run")
    process.communicate("")
    quiet_train(setup, tmp_path / "run")


def test_a_full_disk_is_found_before_the_run(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(FinefitError, match="free some space"):
        quiet_train(plan(), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_space_asked_for_covers_what_checkpoints_take(
    plan: Callable[..., TrainSetup], tmp_path: Path
) -> None:
    for number, changes in enumerate([{}, {"method": "full"}, {"method": "full", "optimizer": "adamw-8bit"}]):
        setup = plan(max_steps=2, **changes)
        folder = tmp_path / str(number)
        quiet_train(setup, folder)
        found, _ = newest_checkpoint(folder / "checkpoints")
        assert found is not None
        on_disk = sum(p.stat().st_size for p in found.path.glob("*.safetensors"))
        asked = position.checkpoint_bytes(setup, found.weights)
        # small files: headers and code books weigh more than in any real run
        assert asked == pytest.approx(on_disk, rel=0.25)


def zero_loss(model: Any, batch: Any, num_trained: int, phase: Any) -> torch.Tensor:
    return loss.full_loss(model, batch, num_trained, phase) * 0


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_row(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with a 7 in them have no loss."""
    seven = 4 + ord("7") - ord(" ")

    def broken(model: Any, batch: Any, *args: Any) -> torch.Tensor:
        is_hit = bool((batch["input_ids"] == seven).any())
        return loss.full_loss(model, batch, *args) * (torch.nan if is_hit else 1.0)

    monkeypatch.setitem(loss.LOSSES, "full", broken)
    weights: list[torch.Tensor] = []
    monkeypatch.setattr(
        run, "describe_batch", spy(run.describe_batch, lambda step, *_: weights.extend(step.parameters))
    )
    with pytest.raises(
        FinefitError, match=r"diverged at step \d.*stopped-batch\.json.*lower learning_rate"
    ) as caught:
        quiet_train(plan(method="full", micro_batch_size=1, grad_accum_steps=12), tmp_path / "run")
    assert caught.value.exit_code == 1
    assert all(bool(w.isfinite().all()) for w in weights), "the weights are those before the step"
    stopped = json.loads((tmp_path / "run/stopped-batch.json").read_text())
    assert (stopped["loss"], stopped["step"]) == ("nan", metrics(tmp_path / "run", "stopped")[0]["step"])
    assert any(row["loss"] == "nan" for row in stopped["rows"])
    for row in stopped["rows"]:
        assert (row["loss"] == "nan") == ("7" in row["text"])
        assert row["place"].endswith(f"rows.jsonl:{row['row']}")
        assert f"n {row['row'] - 1}" in row["text"]
    assert not (tmp_path / "run" / "model").exists()


def spy(function: Any, look: Any) -> Any:
    def spied(*args: Any) -> Any:
        look(*args)
        return function(*args)

    return spied


def test_a_loss_that_has_blown_up_stops_the_run(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Divergence, "see", lambda self, loss: "it grows" if self.begin else self.begin.append(loss)
    )
    with pytest.raises(FinefitError, match=r"diverged at step 2: it grows"):
        quiet_train(plan(), tmp_path / "run")
    assert len(json.loads((tmp_path / "run/stopped-batch.json").read_text())["rows"]) == 8


def test_adapters_without_gradients_stop_the_run(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.LOSSES, "full", zero_loss)
    with pytest.raises(FinefitError, match=r"lora_B.*gets no gradient"):
        quiet_train(plan(), tmp_path / "run")


def test_an_adapter_that_reads_back_differently_is_an_error(
    plan: Callable[..., TrainSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import train as train_module

    original = train_module.write_artifact

    def damaged(*args: Any) -> Path:
        from safetensors.torch import save_file

        target = original(*args)
        file = target / "adapter_model.safetensors"
        save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
        return target

    monkeypatch.setattr(train_module, "write_artifact", damaged)
    with pytest.raises(FinefitError, match="read back"):
        quiet_train(plan(max_steps=2), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_settings_that_cannot_be_followed_are_noted(plan: Callable[..., TrainSetup], tmp_path: Path) -> None:
    setup = plan(method="full", optimizer_in_backward=True, grad_accum_steps=1, max_steps=1)
    assert "max_grad_norm is not applied" in quiet_train(setup, tmp_path / "run").notes[0]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": None}, SetupError),
        ({"data": "nowhere.jsonl"}, DataError),
        ({"model": "no/such-folder-or-model"}, FinefitError),
        ({"attention": "flash"}, SetupError),
    ],
)
def test_what_cannot_run_says_so_in_one_line(
    plan: Callable[..., TrainSetup], tmp_path: Path, changes: dict[str, Any], error: type
) -> None:
    with pytest.raises(error) as caught:
        quiet_train(plan(**changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_progress_goes_to_stderr_with_the_time_left(
    plan: Callable[..., TrainSetup], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(plan(max_steps=3), tmp_path / "run")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "held out after step 0: loss" in captured.err
    assert re.search(r"step 2/3: loss \d\.\d+, [\d,]+ tokens/s, .* left", captured.err)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiled_layers_train_evaluate_and_answer_like_plain_ones(
    plan: Callable[..., TrainSetup], tmp_path: Path
) -> None:
    changes = {"checkpointing": "full", "loss": "chunked", "max_steps": 2}
    plain = quiet_train(plan(**changes), tmp_path / "plain")
    compiled = quiet_train(plan(**changes, compile=True), tmp_path / "compiled")
    assert compiled.final_loss == pytest.approx(plain.final_loss, rel=1e-3)
    assert compiled.eval_after["loss"] == pytest.approx(plain.eval_after["loss"], rel=1e-3)
