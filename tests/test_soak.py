"""The soak (`make soak`) in small: real processes, real kills; and what it reads of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from soak_life import AFTER, BETWEEN, START, Reports

SOAK = Path(__file__).parent / "soak.py"
NUM_KILLS, NUM_IN_SAVES, NUM_STOPS = 15, 5, 4


def reports_of(*lines: str) -> Reports:
    """As a life that said these, one a second, and ended."""
    receiver, sender = os.pipe()
    for second, words in enumerate(lines, start=1):
        os.write(sender, f"{second * 10**9} {words}\n".encode())
    os.close(sender)
    reports = Reports(receiver)
    while reports.wait(1.0):
        pass
    os.close(receiver)
    return reports


def test_a_kill_is_counted_where_the_life_last_said_it_was() -> None:
    said = (
        "begin step",
        "end step",
        "begin save",
        "begin save: files",
        "end save: files",
        "saved 3",
        "end save",
    )
    reports = reports_of(*said, f"begin {AFTER}")
    moments = {
        0.5: START,
        1.5: "step",
        2.5: BETWEEN,
        3.5: "save",
        4.5: "save: files",
        5.5: "save",
        7.5: BETWEEN,
    }
    assert {moment: reports.phase_at(moment) for moment in moments} == moments
    assert reports.phase_at(9) == AFTER
    assert reports.last_number("saved") == 3
    assert reports.last_number("resumed") is None
    assert reports.seconds() == {"step": [1.0], "save: files": [1.0], "save": [4.0]}
    assert reports.wait_for("save", 1, 0.0) == 3
    assert reports.wait_for("save", 2, 0.0) is None


@pytest.mark.train
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
def test_kills_and_stops_of_a_real_run_change_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--seed", "5", "--report", str(tmp_path / "soak")]
    numbers = {"kills": NUM_KILLS, "in-saves": NUM_IN_SAVES, "stops": NUM_STOPS, "interrupts": 1, "fresh": 0}
    numbers |= {"plans": 0, "files": 0}
    command += [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["failures"] == []
    assert sum(found["kills"].values()) >= NUM_KILLS
    assert found["kills_in_saves"] >= NUM_IN_SAVES
    assert sum(found["stops"]["SIGTERM"].values()) >= NUM_STOPS
    assert found["resumes"] > NUM_KILLS / 2
