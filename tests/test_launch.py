"""Processes of one run, without torch: whose failure is told, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from bench import launch
from bench.launch import LostPeerError, PassedOnStop, RankError, run_ranks
from planner.errors import DataError, InterruptedRunError


def fail_apart(folder: str, error: Exception | None) -> None:
    """The second rank fails; the first loses it, and says so sooner."""
    if os.environ["RANK"] == "0":
        raise LostPeerError("another rank is gone")
    time.sleep(0.2)
    if error is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (DataError("rows.jsonl", "broken", 3), DataError, "rows.jsonl:3: broken"),
        (InterruptedRunError("stopped"), InterruptedRunError, "stopped"),
        (KeyError("x"), RankError, "rank 1: unexpected error"),
        (None, RankError, "rank 1 was ended by SIGKILL"),
    ],
)
def test_the_cause_is_told_and_not_what_follows_from_it(tmp_path, error, expected, words):
    with PassedOnStop() as stop, pytest.raises(expected, match=words) as raised:
        run_ranks(stop, 2, fail_apart, str(tmp_path), error)
    if isinstance(error, InterruptedRunError):
        assert raised.value.exit_code == 33


def wait_for_ever_on_the_first(folder: str) -> None:
    (Path(folder) / os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    raise DataError("rows.jsonl", "broken")


@pytest.mark.slow
def test_ranks_that_wait_for_a_lost_one_are_ended(tmp_path):
    with (
        mock.patch.object(launch, "GRACE_S", 1.0),
        PassedOnStop() as stop,
        pytest.raises(DataError, match="broken"),
    ):
        run_ranks(stop, 2, wait_for_ever_on_the_first, str(tmp_path))
    assert not any(rank.is_alive() for rank in stop.ranks)


def test_launching_needs_no_torch():
    code = "import sys, bench.launch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
