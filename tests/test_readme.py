"""What the READMEs say is so: the commands parse, both languages agree, the figures are the code's."""

import re
import shlex
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
BLOCK = re.compile(r"```(?:sh|python)\n(.*?)```", re.DOTALL)
ACCURACY = re.compile(r"<!-- accuracy.*?-->\n(.*?)<!-- /accuracy -->", re.DOTALL)

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the source tree")


def commands(readme: str) -> list[str]:
    return [line for block in BLOCK.findall((ROOT / readme).read_text()) for line in block.splitlines()]


def finefit_commands() -> list[str]:
    return [line for line in commands("README.md") if line.startswith("finefit ")]


def test_both_languages_have_the_same_commands() -> None:
    assert commands("README.md") == commands("README.zh-CN.md")


@pytest.mark.parametrize("line", finefit_commands())
def test_commands_parse(line: str) -> None:
    import click

    from bench.cli import cli

    words = shlex.split(line)[1:]
    command = cli.commands[words[0]]
    existing = [str(ROOT / w) if (ROOT / w).is_file() else w for w in words[1:]]
    readable = [str(ROOT / "README.md") if w in ("plan.yaml", "results.jsonl") else w for w in existing]
    context = click.Context(command, info_name=words[0], parent=click.Context(cli))
    command.parse_args(context, readable)


def measured_errors() -> dict[str, list[float]]:
    from planner.accuracy import compare
    from planner.cases import read_case

    lines = (ROOT / "evidence" / "memory-runs.jsonl").read_bytes().splitlines()
    cases = [read_case(line, number) for number, line in enumerate(lines, 1)]
    chosen = [
        case
        for case in cases
        if case["id"].startswith("fms-")
        and case["setup"]["kernels"] == "plain"
        and case["setup"]["num_gpus"] == 1
        and case["lengths"] == "exact"
        and "num_local_experts" not in case["setup"]["model"]
    ]
    errors: dict[str, list[float]] = {}
    for compared in compare(chosen):
        if compared.error is not None:
            errors.setdefault(compared.group.method, []).append(abs(compared.error))
    return errors


@pytest.mark.parametrize("readme", READMES)
def test_accuracy_table_is_what_the_code_says(readme: str) -> None:
    found = ACCURACY.search((ROOT / readme).read_text())
    assert found is not None
    rows = [row.strip("| ").split(" | ") for row in found.group(1).splitlines()[2:]]
    expected = [
        [method, str(len(errors)), f"{statistics.fmean(errors):.1%}", f"{max(errors):.1%}"]
        for method, errors in measured_errors().items()
    ]
    assert [[cell.replace(" %", "%") for cell in row] for row in rows] == expected


def test_dense_runs_are_within_five_percent_on_average() -> None:
    errors = [error for group in measured_errors().values() for error in group]
    assert statistics.fmean(errors) <= 0.05


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / readme).read_text())
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / t).exists()]
    assert missing == []


def test_python_api_example_runs() -> None:
    from planner.api import estimate, fits, plan

    answer = estimate("llama-3.1-8b", gpu="rtx-4090", method="qlora", seq_len=4096)
    assert answer.fit.verdict == "fits"
    assert plan("smollm2-135m-instruct", gpu="rtx-4090").estimate.fit.verdict == "fits"
    table = fits("a100-80gb-sxm4:2", models=["llama-3.1-8b"], methods=["lora", "full"])
    assert [e.setup.num_gpus for e in table] == [2, 2]
