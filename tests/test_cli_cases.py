"""`finefit estimate --cases`: a line for every case, in order, whatever the file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.cli import run
from planner.cases import answer_cases
from planner.cli_options import Session, resolve_machine
from planner.estimate import estimate
from planner.specs import Machine

SETUP = {"model": "smollm2-135m", "method": "lora", "seq_len": 256}


def find_machine(words: str, fields: dict[str, Any]) -> Machine:
    return resolve_machine(Session(), words, fields)


def answers(*lines: Any, gpu: str | None = None) -> list[dict[str, Any]]:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return list(answer_cases(raw, estimate, find_machine, gpu))


def case(identity: Any = "a", **changes: Any) -> dict[str, Any]:
    return {"id": identity, "gpu": "rtx-4090", "setup": SETUP, **changes}


def with_setup(**changes: Any) -> dict[str, Any]:
    return case(setup={**SETUP, **changes})


def test_every_case_is_answered_in_order_with_its_id() -> None:
    found = answers(case("b"), case(7), b"", b"  \n", case(None), case("ü\ud800"))
    assert [answer["id"] for answer in found] == ["b", 7, None, "ü\ud800"]
    assert len({answer["memory"]["peak_allocated_bytes"] for answer in found}) == 1
    assert all(answer["schema_version"] == 1 for answer in found)


def test_other_keys_are_ignored_and_the_stack_goes_into_the_setup() -> None:
    stack = "transformers 4.48.1, peft 0.13.2"
    (answer,) = answers(case(stack=stack, measured={"x": 1}, notes="n"))
    assert answer["setup"]["stack"] == stack
    (own,) = answers(case(stack=stack, setup={**SETUP, "stack": "torch 2.4.1"}))
    assert own["setup"]["stack"] == "torch 2.4.1"


def test_the_gpu_of_the_command_line_comes_first() -> None:
    assert answers(case(), gpu="a100-80gb-sxm")[0]["gpu"] == "A100 80GB SXM4"
    assert "memory" in answers(case(gpu=None), gpu="l40")[0]


def test_a_count_in_the_gpu_or_in_the_setup_means_the_same() -> None:
    sharded = {**SETUP, "sharding": "fsdp"}
    by_gpu, by_setup = answers(case(gpu="rtx-4090:2", setup=sharded), case(setup={**sharded, "num_gpus": 2}))
    assert by_gpu == by_setup
    assert by_gpu["setup"]["num_gpus"] == 2


def test_an_inline_config_is_a_model() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    }
    (answer,) = answers(with_setup(model=config))
    assert answer["setup"]["model"] == config
    assert answer["memory"]["terms"]["weights"] > 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (with_setup(rnak=8), "nearest: rank"),
        (with_setup(rank="8"), "rank"),
        (with_setup(rank=None), "rank"),
        (with_setup(num_gpus="2"), "num_gpus"),
        (with_setup(num_gpus=[2]), "num_gpus"),
        (with_setup(num_gpus=2), "sharding"),
        (with_setup(model="no-such-model"), "unknown model"),
        (with_setup(model={"model_type": "llama"}), "hidden_size"),
        (with_setup(model=7), "model"),
        (with_setup(method="qlora", sharding="zero3"), "ZeRO-3"),
        (with_setup(targets=["nothing"]), "targets"),
        (with_setup(optimizer={"a": 1}), "optimizer"),
        (case(gpu="A100 (not stated)"), "unknown GPU"),
        (case(gpu="tpu-v5e"), "not modelled"),
        (case(gpu=4090), "gpu"),
        ({"id": "a", "gpu": "rtx-4090"}, "setup"),
        (case(setup=[1]), "setup"),
        (case(stack=3), "stack"),
        ([1, 2], "object"),
        (b'{"id": "a", "gpu": ', "line 1: not JSON"),
        (b"\xff\xfe", "line 1: not JSON"),
        (b'{"id": "a", "gpu": "rtx-4090", "setup": {"alpha": NaN}}', "NaN"),
        (b"[" * 100_000, "line 1"),
        (b'{"id": "a", "gpu": "rtx-4090", "setup": {"seed": ' + b"9" * 5000 + b"}}", "line 1"),
    ],
    ids=str,
)
def test_a_case_that_can_not_be_expressed_is_a_line_with_its_error(line: Any, says: str) -> None:
    bad, good = answers(line, case("after"))
    assert says in bad["error"]
    assert "\n" not in bad["error"]
    assert not bad["error"].startswith("unexpected")
    assert "memory" not in bad
    assert good["id"] == "after"
    assert "error" not in good


def test_a_defect_of_finefit_costs_its_own_case_only() -> None:
    def answer(setup: Any, machine: Machine) -> Any:
        if setup.seq_len == 1:
            raise ZeroDivisionError("oops")
        return estimate(setup, machine)

    lines = [json.dumps(c).encode() for c in (with_setup(seq_len=1), case("b"))]
    broken, whole = answer_cases(lines, answer, find_machine)
    assert broken["error"] == "unexpected ZeroDivisionError: oops"
    assert whole["id"] == "b"


def test_an_empty_list_of_targets_is_refused() -> None:
    (answer,) = answers(with_setup(targets=[]))
    assert "targets" in answer["error"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from(
    ["model", "method", "rank", "num_gpus", "targets", "seq_len", "stack", "alpha", "quant"]
)


@given(
    st.lists(
        st.binary(max_size=40)
        | st.dictionaries(field_names, json_values).map(
            lambda s: with_setup(**{k: v for k, v in s.items() if v != []})
        )
    )
)
@settings(max_examples=200, deadline=None)
def test_no_file_crashes_it(lines: list[Any]) -> None:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    found = answers(*raw)
    assert len(found) == sum(1 for line in raw if line.strip())
    for answer in found:
        assert ("error" in answer) != ("memory" in answer)
        assert not answer.get("error", "").startswith("unexpected")


def test_the_command_prints_one_json_line_per_case_and_exits_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cases.jsonl"
    huge = with_setup(micro_batch_size=4096)
    lines = [json.dumps(c) for c in (case("a"), with_setup(rnak=1), huge)]
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join([*lines, "{"]).encode())
    assert run(["estimate", "--cases", str(file), "--json"]) == 0
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err == ""
    assert [("error" in answer) for answer in found] == [False, True, False, True]
    assert found[2]["fit"]["verdict"] == "does-not-fit"
    assert run(["estimate", "--cases", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
