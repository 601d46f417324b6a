"""Conversions at the border, and the tree of errors with its exit codes."""

import inspect
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner.errors as errors
from planner.units import (
    DTYPE_BYTES,
    GIB,
    format_bytes,
    format_count,
    format_duration,
    gib,
    gib_to_bytes,
)

TREE = {
    "FinefitError": (1, Exception),
    "UsageError": (2, errors.FinefitError),
    "UnknownNameError": (2, errors.UsageError),
    "SetupError": (2, errors.UsageError),
    "ConfigError": (1, errors.FinefitError),
    "ProfileError": (1, errors.FinefitError),
    "DataError": (1, errors.FinefitError),
    "NotModelledError": (1, errors.FinefitError),
    "MissingExtraError": (1, errors.FinefitError),
    "DoesNotFitError": (3, errors.FinefitError),
    "GateError": (3, errors.FinefitError),
    "LimitError": (3, errors.FinefitError),
    "InterruptedRunError": (33, errors.FinefitError),
}


def all_errors():
    return {
        name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, Exception)
    }


@pytest.mark.parametrize("name", sorted(TREE))
def test_an_error_has_its_place_and_its_exit_code(name):
    code, parent = TREE[name]
    assert all_errors()[name].exit_code == code
    assert all_errors()[name].__base__ is parent


def test_the_tree_at_the_files_top_is_the_tree():
    drawn = dict(re.findall(r"^[│├└─ ]*(\w+Error)\s+(\d+)", errors.__doc__, re.MULTILINE))
    assert {name: int(code) for name, code in drawn.items()} == {
        name: code for name, (code, _) in TREE.items()
    }
    assert set(all_errors()) == set(TREE)


def test_errors_carry_what_a_program_needs():
    assert errors.DoesNotFitError("short", 123).short_by_bytes == 123
    assert errors.SetupError("rank", "is 0").field == "rank"
    assert str(errors.SetupError("rank", "is 0")) == "rank: is 0"
    error = errors.DataError("rows.jsonl", "not JSON", line=7)
    assert (error.path, error.line) == ("rows.jsonl", 7)
    assert str(error) == "rows.jsonl:7: not JSON"
    assert "pip install 'finefit[train]'" in str(errors.MissingExtraError("train", "train", "torch"))


def test_nearest_names_come_best_first_and_are_known():
    known = ["RTX 4090", "RTX 4080", "RTX 3090", "A100 80GB SXM4"]
    assert errors.nearest_names("rtx-4090", known)[0] == "RTX 4090"
    assert errors.nearest_names("A100", known) == ["A100 80GB SXM4"]
    assert errors.nearest_names("", known) == []
    assert errors.nearest_names("???", known) == []


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=12), max_size=8))
def test_nearest_names_are_a_few_known_ones_whatever_is_asked(name, known):
    near = errors.nearest_names(name, known)
    assert set(near) <= set(known)
    assert len(near) == len(set(near)) <= 4


@given(st.integers(0, 2**60))
def test_gib_and_back(num_bytes):
    assert gib(gib_to_bytes(gib(num_bytes))) == pytest.approx(gib(num_bytes), abs=1 / GIB)


def test_sizes_are_binary():
    assert gib_to_bytes(1.5) == 1_610_612_736
    assert gib(2**30) == 1.0
    assert DTYPE_BYTES == {"float32": 4, "bfloat16": 2, "float16": 2}


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 MiB"),
        (2**20, "1 MiB"),
        (100 * 2**20, "100 MiB"),
        (2**30, "1.0 GiB"),
        (-(2**31), "-2.0 GiB"),
        (80 * 2**30, "80.0 GiB"),
    ],
)
def test_sizes_as_people_read_them(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.0123 s"),
        (59, "59 s"),
        (89.4, "89.4 s"),
        (90, "2 min"),
        (3599, "60 min"),
        (5400, "1 h 30 min"),
        (7199, "2 h 00 min"),
        (86_400, "24 h 00 min"),
    ],
)
def test_durations_as_people_read_them(seconds, text):
    assert format_duration(seconds) == text


@given(st.floats(0, 1e9))
def test_minutes_never_reach_sixty_beside_hours(seconds):
    found = re.fullmatch(r"(\d+) h (\d\d) min", format_duration(seconds))
    assert found is None or int(found[2]) < 60


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999_999, "999999"), (1e6, "1.0 M"), (8.03e9, "8.03 B")]
)
def test_counts_as_people_read_them(count, text):
    assert format_count(count) == text
