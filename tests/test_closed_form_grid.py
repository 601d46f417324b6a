"""The grid of traced configurations, the closed form beside it, and the report that says how they agree."""

import json
import random
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "evidence" / "closed-form-vs-trace.jsonl"
REPORT = ROOT / "reports" / "closed-form-vs-trace.md"

pytestmark = pytest.mark.skipif(not ROWS.is_file(), reason="needs the source tree")


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def compared(rows, scripts):
    from closed_form_report import compare

    return [compare(row) for row in rows]


def test_the_grid_is_the_generators(rows):
    from closed_form_grid import cases

    setups = {case.id: json.loads(json.dumps(case.setup)) for case in cases()}
    assert {row["id"]: row["setup"] for row in rows}.items() <= setups.items()
    assert len(rows) >= 600


def test_every_value_meets_every_architecture(rows):
    from closed_form_architectures import ARCHITECTURES
    from closed_form_grid import ADAPTER_FIELDS, FIELDS, RECIPES

    rows = [row for row in rows if row["id"].partition("/")[2].isdigit()]
    by_architecture = Counter(row["id"].partition("/")[0] for row in rows)
    assert len(by_architecture) >= 25
    assert set(by_architecture.values()) == {len(RECIPES)}
    plain = [f for f in FIELDS if f not in ("shape", "loss", "packing", "attention", "targets")]
    for name in by_architecture:
        setups = [row["setup"] for row in rows if row["id"].startswith(f"{name}/")]
        for field in plain:
            wanted = set(ARCHITECTURES[name].only.get(field, FIELDS[field]))
            found = {s[field] for s in setups if field in s or field not in ADAPTER_FIELDS}
            assert found >= wanted, (name, field)


def test_the_rarer_methods_agree_on_several_architectures(compared):
    from closed_form_grid import METHODS

    for method in METHODS:
        errors = {row.id: abs(row.peak) for row in compared if row.setup["method"] == method}
        assert len({name.partition("/")[0] for name in errors}) >= 3, method
        assert statistics.median(errors.values()) <= 0.002, method
        assert max(errors.values()) <= 0.02, (method, max(errors, key=errors.get))


def test_closed_form_and_trace_agree(compared):
    """What the report shows, held as a bound that a change may only tighten."""
    errors = [abs(row.peak) for row in compared]
    assert statistics.median(errors) <= 0.001
    assert sum(error <= 0.01 for error in errors) / len(errors) >= 0.8


def test_the_committed_report_is_the_codes(rows):
    from closed_form_report import report

    assert REPORT.read_text() == report(rows, worst=20), "run scripts/reports.sh"


def retrace(row):
    from closed_form_grid import Case, trace_case

    found = trace_case(Case(id=row["id"], setup=row["setup"]))["traced"]
    traced = row["traced"]
    assert found["peak_bytes"] == pytest.approx(traced["peak_bytes"], rel=1e-4)
    assert {p: found["phases"][p] for p in traced["phases"]} == pytest.approx(traced["phases"], rel=2e-3)


def sample(count):
    lines = ROWS.read_text().splitlines() if ROWS.is_file() else []
    rows = [json.loads(line) for line in lines]
    rows = [
        row for row in rows if row["setup"]["attention"] == "eager" and row["setup"].get("quant") != "int8"
    ]
    return random.Random(7).sample(rows, min(count, len(rows)))


@pytest.mark.train
@pytest.mark.parametrize("row", sample(2), ids=lambda row: row["id"])
def test_a_row_traced_again_gives_the_same_bytes(row):
    retrace(row)


@pytest.mark.train
@pytest.mark.slow
@pytest.mark.parametrize("row", sample(16)[2:], ids=lambda row: row["id"])
def test_more_rows_traced_again_give_the_same_bytes(row):
    retrace(row)
