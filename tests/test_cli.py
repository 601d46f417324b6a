"""The command line as a person meets it: words, exit codes, one line per error, nothing half-written."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from bench.cli import cli, run
from planner.catalog import find_gpu, gpus
from planner.cli_options import Session, complete_gpus
from planner.lengths import DataLengths
from planner.planfile import read_plan
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import GIB

MODEL = "smollm2-135m"
FINEFIT = (sys.executable, "-c", "import sys; from bench.cli import main; sys.exit(main())")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def finefit(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str, session: Session | None = None) -> tuple[int, str, str]:
        code = run(arguments, session)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def assert_one_error(result: tuple[int, str, str], code: int, *says: str) -> None:
    assert result[0] == code
    assert result[1] == ""
    assert result[2].count("\n") == 1
    assert result[2].startswith("finefit: ")
    for words in says:
        assert words in result[2]


# words


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_with_an_example_that_parses(name: str, finefit: Run) -> None:
    code, out, err = finefit(name, "--help")
    assert (code, err) == (0, "")
    command = cli.commands[name]
    assert command.help
    example = " ".join(str(command.epilog).split()).removeprefix("Example: ")
    assert example in " ".join(out.split())
    words = shlex.split(example.replace('eval "$(', "").replace(')"', ""))
    assert words[:2] == ["finefit", name]
    for file in (Path(word) for word in words[2:] if Path(word).suffix == ".jsonl"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    command.make_context(name, words[2:], obj=Session())


@pytest.mark.parametrize("name", ["estimate", "plan"])
def test_every_field_of_a_setup_is_an_option_of_the_same_name(name: str) -> None:
    options = {opt for p in cli.commands[name].params if isinstance(p, click.Option) for opt in p.opts}
    wanted = {"--" + f.name.replace("_", "-") for f in fields(TrainSetup) if f.name != "model"}
    assert wanted <= options


def test_licences_under_conditions_are_named(finefit: Run) -> None:
    words = ("fits", "l40", "--model", MODEL, "--model", "llama-3.1-8b", "--model", "aya-23-8b")
    code, out, err = finefit(*words, "--license", "commercial", "--json")
    assert code == 0
    assert {row["model"] for row in json.loads(out)["rows"]} == {"SmolLM2-135M", "Llama-3.1-8B"}
    assert "Llama-3.1-8B" in err
    assert "SmolLM2" not in err


def test_no_words_show_the_help(finefit: Run) -> None:
    code, out, err = finefit()
    assert (code, err) == (0, "")
    assert all(name in out for name in cli.commands)


def test_the_version_is_one_line(finefit: Run) -> None:
    assert finefit("--version")[1].startswith("finefit ")
    assert finefit("-h")[0] == 0


def test_options_reach_the_setup(finefit: Run) -> None:
    words = "--method qlora --rank 8 --targets q_proj,v_proj --packing --no-kbit-upcast --max-grad-norm none"
    code, out, _ = finefit("estimate", MODEL, "--gpu", "rtx 4090", *words.split(), "--json")
    setup = json.loads(out)["setup"]
    assert code == 0
    assert setup["method"] == "qlora"
    assert setup["rank"] == 8
    assert setup["targets"] == ["q_proj", "v_proj"]
    assert setup["packing"] is True
    assert setup["kbit_upcast"] is False
    assert setup["max_grad_norm"] is None
    assert TrainSetup.from_dict(setup).to_dict() == setup


# wrong words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("fits rtx-4091", ("unknown GPU", "RTX 4090")),
        ("fits rtx-4090:0", ("count",)),
        ("fits rtx-4090 --model llama-99b", ("unknown model", "finefit list models")),
        ("fits rtx-4090 --method lorra", ("unknown method", "lora")),
        ("fits rtx-4090 --rank eight", ("rank", "not a whole number")),
        ("fits rtx-4090 --attention flsh", ("attention", "sdpa, flash, eager")),
        ("fits rtx-4090 --targets nothing --method lora", ("targets",)),
        ("fits rtx-4090:2 --sharding device-map", ("sharding", "device_map")),
        ("estimate smollm2-135m", ("which GPU",)),
        ("estimate --gpu rtx-4090", ("which model",)),
        ("estimate smollm2-135m --gpu rtx-4090:2 --num-gpus 3", ("give one of them",)),
        ("estimate smollm2-135m --gpu rtx-4090:2", ("sharding",)),
        ("estimate smollm2-135m --gpu rtx-4090 --method qlora --sharding zero3", ("ZeRO-3",)),
        ("estimate smollm2-135m --gpu rtx-2080-ti", ("bfloat16", "float16")),
        ("estimate smollm2-135m --gpu rtx-4090 --optimizer adam", ("unknown optimizer", "adamw")),
        ("estimate smollm2-135m --gpu rtx-4090 --rnak 8", ("--rnak", "finefit estimate --help")),
        ("estimate --cases x.jsonl --rank 8", ("--cases takes only",)),
        ("show nonsense-99", ("unknown name",)),
        ("list everything", ("gpus",)),
        ("explode", ("No such command",)),
        ("export plan.yaml --to axolottl --out d", ("unknown format",)),
        pytest.param("compare a.jsonl", ("two files",), marks=pytest.mark.train),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_2(words: str, says: tuple[str, ...], finefit: Run) -> None:
    assert_one_error(finefit(*words.split()), 2, *says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("estimate no-such.yaml --gpu rtx-4090", "no-such.yaml"),
        ("estimate --cases no-such.jsonl", "no-such.jsonl"),
        ("estimate --cases .", "can't read"),
        ("export no-such.yaml --to trl --out d", "no-such.yaml"),
        pytest.param("compare no-such.jsonl --predicted", "no-such.jsonl", marks=pytest.mark.train),
        ("estimate smollm2-135m --gpu tpu-v5e", "not modelled"),
    ],
)
def test_what_can_not_be_read_is_one_line_and_exit_1(words: str, says: str, finefit: Run) -> None:
    assert_one_error(finefit(*words.split()), 1, says)


def test_a_defect_is_one_line_and_a_traceback_under_debug(
    finefit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("planner.cli.find_kind", fail)
    assert_one_error(finefit("list", "gpus"), 1, "RuntimeError", "--debug")
    for words in (("list", "gpus", "--debug"), ("--debug", "list", "gpus")):
        code, _, err = finefit(*words)
        assert code == 1
        assert "Traceback" in err


def test_a_user_error_has_a_traceback_only_under_debug(finefit: Run) -> None:
    assert "Traceback" not in finefit("fits", "rtx-4091")[2]
    assert "Traceback" in finefit("fits", "rtx-4091", "--debug")[2]


def test_a_missing_extra_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("model: smollm2-135m\n")
    program = "import sys; sys.modules['torch'] = None; from bench.cli import main; sys.exit(main())"
    for command in ("bench", "train"):
        result = subprocess.run(
            [sys.executable, "-c", program, command, "plan.yaml"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert_one_error((result.returncode, result.stdout, result.stderr), 1, "pip install 'finefit[train]'")
        assert f"`finefit {command}`" in result.stderr


def test_what_a_file_holds_can_not_steer_the_terminal(finefit: Run, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J"
    case = {"id": evil, "gpu": "rtx-4090", "setup": {"model": evil, "rank": evil}}
    (tmp_path / "cases.jsonl").write_text(json.dumps(case))
    (tmp_path / "plan.yaml").write_text(f"model: {json.dumps(evil)}\ngpu: rtx-4090\n")
    for words in (("--cases", "cases.jsonl"), ("--cases", "cases.jsonl", "--json"), ("plan.yaml",)):
        _, out, err = finefit("estimate", *words)
        assert "\x1b" not in out + err
    assert "\x1b" not in finefit("show", evil)[2]


# streams and signals


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [*FINEFIT, "list", "gpus", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_an_interrupt_is_one_line_and_exit_130() -> None:
    process = subprocess.Popen(
        [*FINEFIT, "estimate", "--cases", "-", "--json", "--gpu", "rtx-4090"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write('{"id": 1}\n')
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.split() == ["finefit:", "interrupted"]


def test_a_console_that_knows_ascii_only_gets_an_answer() -> None:
    result = subprocess.run(
        [*FINEFIT, "estimate", MODEL, "--gpu", "rtx-4090"],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
    )
    assert result.returncode == 0
    assert result.stderr == b""
    assert b"fits" in result.stdout


def test_shell_completion_offers_names_that_resolve(finefit: Run) -> None:
    offered = [item.value for item in complete_gpus("")]
    assert {find_gpu(name).name for name in offered if name != "local"} == set(gpus())
    assert "rtx-4090" in {item.value for item in complete_gpus("RTX-409")}
    for shell in ("bash", "zsh", "fish"):
        if shell != "bash":
            assert "_FINEFIT_COMPLETE" in finefit("completion", shell)[1]
    env = {
        "_FINEFIT_COMPLETE": "zsh_complete",
        "COMP_WORDS": "finefit estimate m --method q",
        "COMP_CWORD": "4",
    }
    program = "import sys; sys.argv = ['finefit']; from bench.cli import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert "qlora" in result.stdout


# this machine


def local_session(num_gpus: int = 2, **more: Any) -> Session:
    machine = Machine(gpu=find_gpu("rtx-4090"), num_gpus=num_gpus, free_bytes=20 * GIB, is_local=True)
    return Session(local_machine=lambda: machine, **more)


def test_local_is_this_machine_with_what_is_free_now(finefit: Run) -> None:
    words = ("estimate", MODEL, "--gpu", "local:1", "--json")
    code, out, _ = finefit(*words, session=local_session())
    assert code == 0
    assert json.loads(out)["fit"]["usable_bytes"] < 20 * GIB
    fields_given = ("--num-gpus", "1")
    assert finefit("estimate", MODEL, "--gpu", "local", *fields_given, session=local_session())[0] == 0
    assert_one_error(finefit("fits", "local:3", session=local_session()), 2, "this machine has 2")


def test_without_a_way_to_read_the_hardware_local_says_so(finefit: Run) -> None:
    assert_one_error(finefit("fits", "local", session=Session()), 1, "finefit[train]")


def test_no_command_offers_a_trace_that_is_not_there(finefit: Run) -> None:
    result = finefit("estimate", MODEL, "--gpu", "rtx-4090", "--trace", session=Session())
    assert_one_error(result, 1, "finefit[train]")


# plan, export


def test_a_plan_is_written_and_read_back(finefit: Run, tmp_path: Path) -> None:
    code, out, err = finefit("plan", MODEL, "--gpu", "rtx-4090", "--rank", "8", "--json")
    answer = json.loads(out)
    plan = read_plan(tmp_path / "plan.yaml")
    assert code == 0
    assert "plan.yaml" in err
    assert answer["reasons"]
    assert plan.setup.to_dict() == answer["setup"]
    assert plan.setup.rank == 8
    assert plan.gpu == "RTX 4090"
    assert plan.predicted["memory"]["peak_allocated_bytes"] == answer["memory"]["peak_allocated_bytes"]
    again = finefit("estimate", "plan.yaml", "--json")
    assert json.loads(again[1])["memory"] == answer["memory"]
    changed = json.loads(finefit("estimate", "plan.yaml", "--gpu", "a10g", "--seq-len", "64", "--json")[1])
    assert (changed["gpu"], changed["setup"]["seq_len"]) == ("A10G", 64)


def test_a_plan_keeps_the_global_batch(finefit: Run) -> None:
    _, out, _ = finefit("plan", MODEL, "--gpu", "rtx-4090", "--global-batch-size", "24", "--json")
    setup = json.loads(out)["setup"]
    assert setup["micro_batch_size"] * setup["grad_accum_steps"] == 24


def test_only_a_plan_is_overwritten(finefit: Run, tmp_path: Path) -> None:
    notes = tmp_path / "notes.yaml"
    notes.write_text("precious\n")
    words = ("plan", MODEL, "--gpu", "rtx-4090", "--out", "notes.yaml")
    assert_one_error(finefit(*words), 1, "not a finefit plan", "--force")
    assert notes.read_text() == "precious\n"
    assert finefit(*words, "--force")[0] == 0
    assert finefit(*words)[0] == 0


def test_nothing_fits_is_exit_3_and_writes_nothing(finefit: Run, tmp_path: Path) -> None:
    machine = Machine(gpu=find_gpu("rtx-4090"), free_bytes=GIB // 2, is_local=True)
    session = Session(local_machine=lambda: machine)
    assert_one_error(finefit("plan", MODEL, "--gpu", "local", session=session), 3, "nothing fits")
    assert list(tmp_path.iterdir()) == []


def test_the_datas_lengths_decide_the_sequence(finefit: Run) -> None:
    lengths = DataLengths(num_rows=9, mean=100.0, p50=90, p99=300, longest=301, source="9 rows")
    words = ("plan", MODEL, "--gpu", "rtx-4090", "--data", "rows.jsonl", "--json")
    known = Session(token_lengths=lambda wishes: (lengths, None))
    assert 301 <= json.loads(finefit(*words, session=known)[1])["setup"]["seq_len"] < 301 + 64
    unknown = Session(token_lengths=lambda wishes: (None, "no tokenizer here"))
    code, _, err = finefit(*words, session=unknown)
    assert code == 0
    assert "no tokenizer here" in err
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "%s"}\n' % ("word " * 500))
    code, out, err = finefit(*words, session=Session())
    assert code == 0
    assert "estimated from their characters" in err
    assert json.loads(out)["setup"]["seq_len"] >= 500


def test_exported_files_are_named_and_not_overwritten(finefit: Run, tmp_path: Path) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    finefit("plan", MODEL, "--gpu", "rtx-4090", "--data", "rows.jsonl", session=Session())
    code, out, _ = finefit("export", "plan.yaml", "--to", "trl", "--out", "run")
    assert code == 0
    assert {tmp_path / name for name in out.split()} == set((tmp_path / "run").iterdir())
    assert_one_error(finefit("export", "plan.yaml", "--to", "trl", "--out", "run"), 1, "--force")
    words = ("export", "plan.yaml", "--to", "TRL", "--out", "run", "--force", "--set", "rank=4", "--json")
    answer = json.loads(finefit(*words)[1])
    assert all(Path(path).exists() for path in answer["files"])


# verdicts and exit codes


def test_a_single_setup_that_does_not_fit_is_exit_3(finefit: Run) -> None:
    words = ("--micro-batch-size", "512", "--json")
    code, out, _ = finefit("estimate", MODEL, "--gpu", "rtx-4090", *words)
    answer = json.loads(out)
    assert code == 3
    assert answer["fit"]["verdict"] == "does-not-fit"
    assert answer["fit"]["headroom_bytes"] < 0


def test_an_estimate_shows_the_sums_of_its_terms(finefit: Run) -> None:
    _, out, _ = finefit("estimate", MODEL, "--gpu", "rtx-4090", "--json")
    memory = json.loads(out)["memory"]
    terms = dict(memory["terms"])
    outside = terms.pop("fragmentation"), terms.pop("context")
    assert sum(terms.values()) == memory["peak_allocated_bytes"]
    assert memory["peak_allocated_bytes"] + outside[0] == memory["peak_reserved_bytes"]
    assert memory["peak_reserved_bytes"] + outside[1] == memory["device_used_bytes"]


def test_list_and_show_name_their_sources(finefit: Run) -> None:
    _, out, _ = finefit("show", "rtx 4090")
    assert "Sources" in out
    assert "24.0 GiB" in out
    record = json.loads(finefit("show", "rtx 4090", "--json")[1])["gpus"]
    assert record["sources"]
    assert record["memory_bytes"] == 24 * GIB
    for kind in ("gpus", "models", "methods", "optimizers", "formats"):
        listed = json.loads(finefit("list", kind, "--json")[1])
        assert listed["schema_version"] == 1
        for item in listed[kind][:3]:
            assert kind in json.loads(finefit("show", item["name"], "--json")[1])


def test_every_kind_has_its_file() -> None:
    import planner.facts

    names = {path.stem for path in Path(planner.facts.__file__).parent.glob("[a-z]*.py")}
    assert names == set(planner.facts.KIND_NAMES)


def test_stdout_is_data_alone(finefit: Run) -> None:
    for words in (
        ("fits", "a100-80gb-sxm"),
        ("needs", MODEL),
        ("estimate", MODEL, "--gpu", "l40"),
        ("list", "gpus"),
    ):
        model = ("--model", MODEL) if words[0] == "fits" else ()
        code, out, err = finefit(*words, *model, "--json")
        assert (code, err) == (0, "")
        assert out.count("\n") == 1
        assert json.loads(out)["schema_version"] == 1


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_answers_stay_inside_the_terminal(
    columns: int, finefit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (
        ("fits", "rtx-4090", "--model", MODEL),
        ("needs", MODEL),
        ("estimate", MODEL, "--gpu", "rtx-4090"),
        ("list", "optimizers"),
    ):
        lines = finefit(*words)[1].splitlines()
        too_long = [line for line in lines if len(line) > columns and len(line.split()) > 2]
        assert not too_long
