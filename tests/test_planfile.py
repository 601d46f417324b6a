"""plan.yaml: what is written reads back equal; what is wrong is named with its file and line."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.errors import FinefitError, SetupError, UsageError
from planner.fields import FIELDS, SECTIONS, find_field, parse_settings
from planner.plain_yaml import MAX_YAML_BYTES
from planner.planfile import format_plan, parse_plan, read_plan, write_plan
from planner.setup import TrainSetup

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=30)
numbers = st.floats(min_value=1e-9, max_value=1e6, allow_nan=False)
values_by_kind = {
    "str": words,
    "int": st.integers(1, 60_000),
    "float": numbers | st.integers(1, 1000),
    "bool": st.booleans(),
    "list": st.lists(words, min_size=1, max_size=4),
    "model": words | st.dictionaries(words, st.integers() | words | st.booleans() | st.none(), max_size=4),
}


@st.composite
def setups(draw: st.DrawFn) -> TrainSetup:
    setup = TrainSetup(model="m")
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=25, unique=True)):
        field = FIELDS[name]
        drawn = draw(st.sampled_from(field.choices) if field.choices else values_by_kind[field.kind])
        with contextlib.suppress(SetupError):
            setup = setup.with_(**{name: drawn})
    return setup


@given(setups(), words)
@example(TrainSetup(model="m", optimizer="\x85"), "\u2028 a")
@settings(max_examples=60, deadline=None)
def test_a_setup_survives_the_way_to_disk_and_back(setup: TrainSetup, gpu: str) -> None:
    plan = parse_plan(format_plan(setup, gpu, {"step_s": 1.5}), "plan.yaml")
    assert plan.setup == setup
    assert plan.gpu == gpu
    assert plan.predicted == {"step_s": 1.5}


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_plan_or_one_clear_line(text: str) -> None:
    try:
        parse_plan(text, "plan.yaml")
    except UsageError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("plan.yaml")


def test_every_field_is_in_exactly_one_section() -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(f.name for f in dataclasses.fields(TrainSetup))


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("model: a\nrankk: 8\n", 2, "nearest: rank"),
        ("model: a\nrank: eight\n", 2, "not a whole number"),
        ("model: a\n\nrank: 8\nrank: 16\n", 4, "given twice"),
        ("model: a\nseq_len: 8\nseq-len: 9\n", 3, "given twice"),
        ("model: a\nrank: 0\n", 2, "outside"),
        ("model: {hidden_size: 1, hidden_size: 2}\n", 1, "given twice"),
        ("model: a\nrank: [1\n", 3, "not valid YAML"),
        ("model: &x a\ntokenizer: *x\n", 1, "anchors"),
        ("model: !!python/object/apply:os.system [ls]\n", 1, "tags"),
        ("schema_version: 2\nmodel: a\n", 1, "schema_version"),
        ("model: a\ngpu: [rtx-4090]\n", 2, "gpu"),
        ("model: a\nmethod: qlora\nsharding: zero3\nnum_gpus: 2\n", 3, "ZeRO-3"),
        ("model: a\nrevision: 1.0\n", 2, "not a str"),
        ("model: a\npacking: maybe\n", 2, "neither true nor false"),
        ("model: a\n? [1]\n: 2\n", 2, "a key must be a word"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_plan(text, "my.yaml")
    assert str(caught.value).startswith(f"my.yaml:{line}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "null"])
def test_what_is_no_mapping_is_no_plan(text: str) -> None:
    with pytest.raises(UsageError, match="not a plan"):
        parse_plan(text, "my.yaml")


def test_aliases_that_would_unfold_to_gigabytes_are_refused_at_once() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    with pytest.raises(UsageError, match="anchors"):
        parse_plan(bomb, "bomb.yaml")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(UsageError, match="nested"):
        parse_plan("model: " + "[" * 500 + "]" * 500, "deep.yaml")


def test_huge_and_binary_files_are_refused(tmp_path: Path) -> None:
    huge, binary = tmp_path / "huge.yaml", tmp_path / "binary.yaml"
    huge.write_bytes(b"#" * (MAX_YAML_BYTES + 1))
    binary.write_bytes(b"model: a\ndata: \xff\xfe\n")
    with pytest.raises(UsageError, match="larger than"):
        read_plan(huge)
    with pytest.raises(UsageError, match=r"binary\.yaml:2: not UTF-8"):
        read_plan(binary)
    with pytest.raises(FinefitError, match="can't read"):
        read_plan(tmp_path)


def test_yaml_reads_what_people_mean() -> None:
    plan = parse_plan(
        "model: m\nlearning_rate: 2e-4\nmax_grad_norm: none\noffload: none\ntargets: [q_proj, v_proj]\n"
        "data: 2026-11-22\nautocast: none\nrank: '8'\n",
        "p.yaml",
    )
    assert plan.setup.learning_rate == pytest.approx(2e-4)
    assert plan.setup.max_grad_norm is None
    assert plan.setup.offload == "none"
    assert plan.setup.targets == ("q_proj", "v_proj")
    assert plan.setup.data == "2026-11-22"
    assert plan.setup.rank == 8
    assert plan.gpu is None


def test_settings_change_fields_and_the_gpu() -> None:
    text = "model: m\ngpu: rtx-4090\nrank: 8\n"
    plan = parse_plan(text, "p.yaml", ("rank=64", "seq-len=512", "gpu=a100", "targets=q_proj,v_proj"))
    assert (plan.setup.rank, plan.setup.seq_len, plan.gpu) == (64, 512, "a100")
    assert plan.setup.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("rank", "not key=value"),
        ("rnak=8", "nearest: rank"),
        ("rank=8.5", "not a whole number"),
        ("attention=flsh", "not one of sdpa, flash, eager"),
        ("rank=-1", "outside"),
    ],
)
def test_a_wrong_setting_is_named(setting: str, says: str) -> None:
    with pytest.raises(SetupError, match=says) as caught:
        parse_plan("model: m\n", "p.yaml", (setting,))
    assert not str(caught.value).startswith("p.yaml")


def test_the_same_setting_twice_is_refused() -> None:
    with pytest.raises(SetupError, match="twice"):
        parse_settings(("rank=8", "rank=16"))


@given(st.sampled_from(sorted(FIELDS)), st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_typed_value_is_read_or_refused_by_name(name: str, text: str) -> None:
    field = find_field(name)
    try:
        field.parse(text)
    except SetupError as error:
        assert error.field == name


def test_only_a_plan_is_overwritten(tmp_path: Path) -> None:
    setup = TrainSetup(model="m")
    mine, foreign = tmp_path / "plan.yaml", tmp_path / "notes.yaml"
    foreign.write_text("precious: true\n")
    write_plan(mine, setup, "rtx-4090", {})
    write_plan(mine, setup.with_(rank=8), "rtx-4090", {})
    assert read_plan(mine).setup.rank == 8
    with pytest.raises(FinefitError, match="--force"):
        write_plan(foreign, setup, "rtx-4090", {})
    assert foreign.read_text() == "precious: true\n"
    write_plan(foreign, setup, "rtx-4090", {}, force=True)
    assert read_plan(foreign).setup == setup
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.yaml", "plan.yaml"]
