"""What a full card loses to holes: the table, what is drawn from it, one row made again."""

import json
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.pressure import NUM_NODES, keeps_logits, lost_shares, overheads, replayed
from planner.results import PHASES, TERMS, Memory
from planner.setup import TrainSetup

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "pressure.py"
TABLE = ROOT / "profiles" / "calibration" / "pressure.json"


def memory(fragmentation=0, **phases):
    terms = dict.fromkeys(TERMS, 0) | {"weights": max(phases.values()), "fragmentation": fragmentation}
    known = dict.fromkeys(PHASES, min(phases.values())) | phases
    peak_phase = max(phases, key=phases.__getitem__)
    return Memory(phases=known, terms=terms, peak_phase=peak_phase, host_bytes=0, disk_bytes=0)


def test_every_row_is_a_share_of_a_phase_of_the_step():
    assert len(replayed()) >= 60
    for row in replayed():
        assert 0 <= row.lost_share < 1
        assert row.phase in ("forward", "loss", "backward", "optimizer")


@pytest.mark.parametrize("in_optimizer", [True, False])
@pytest.mark.parametrize("trains_base", [True, False])
@pytest.mark.parametrize("with_logits", [True, False])
def test_shares_are_ascending_and_of_such_steps(in_optimizer, trains_base, with_logits):
    shares = lost_shares(in_optimizer, trains_base, with_logits, False)
    assert len(shares) == NUM_NODES
    assert list(shares) == sorted(shares)
    assert set(shares) <= {row.lost_share for row in replayed() if (row.phase == "optimizer") == in_optimizer}


def test_several_gpus_lose_no_more_where_the_whole_model_trains():
    one, many = (lost_shares(False, True, True, is_shared) for is_shared in (False, True))
    assert all(m <= o for o, m in zip(one, many, strict=True))
    assert lost_shares(False, False, True, True) == lost_shares(False, False, True, False)


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_the_phase_that_needs_most_decides(loss, optimizer, steady):
    """Whatever the order of the phases: what is lost is never less than either phase alone would lose."""
    setup = TrainSetup(model="m", method="full")
    found = overheads(
        setup, memory(loss=steady + loss, optimizer=steady + optimizer, save=steady), on_gpu=True
    )
    peak = max(loss, optimizer)
    assert list(found) == sorted(found)
    for node, share in enumerate(lost_shares(False, True, True, False)):
        assert found[node] >= loss - peak + share * loss - 1e-3
    for node, share in enumerate(lost_shares(True, True, True, False)):
        assert found[node] >= optimizer - peak + share * optimizer - 1e-3


def test_a_cpu_keeps_any_share_of_its_fragmentation():
    found = overheads(TrainSetup(model="m"), memory(1000, loss=10, save=5), on_gpu=False)
    assert (found[0], found[-1]) == pytest.approx((25, 975))


def test_losses_that_take_the_head_themselves_keep_no_logits():
    assert keeps_logits(TrainSetup(model="m"))
    assert not keeps_logits(TrainSetup(model="m", loss="chunked"))


@pytest.mark.train
@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree")
def test_a_row_of_the_table_can_be_made_again():
    script = runpy.run_path(str(SCRIPT))
    rows = {row["setup"]: row for row in json.loads(TABLE.read_text())["steps"]}
    fields = next(f for f in script["setups"]() if script["label"](f).startswith("smollm2-1.7b qlora"))
    assert set(rows) == {script["label"](f) for f in script["setups"]()}
    again = script["replayed"](fields)
    assert again["lost_share"] == pytest.approx(rows[again["setup"]]["lost_share"], abs=0.01)
    assert again["phase"] == rows[again["setup"]]["phase"]
