"""Plots for the terminal: never wider than it, plain where colours aren't wanted, true to the sizes."""

from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cli import run
from planner.by_length import by_length
from planner.catalog import find_gpu
from planner.render import display_width
from planner.render_plot import HEIGHT, Bar, format_area, format_limit_bars
from planner.setup import TrainSetup
from planner.specs import Machine

sizes = st.integers(0, 2**50)
bars = st.lists(
    st.builds(
        Bar,
        label=st.sampled_from(["128", "16384"]),
        num_bytes=sizes,
        note=st.sampled_from(["", "fits, 3.0 GiB free"]),
    ),
    min_size=1,
    max_size=8,
)
stretches = st.lists(
    st.tuples(st.sampled_from(["forward", "loss"]), st.lists(sizes, max_size=40)), max_size=6
)


@given(bars=bars, limit=st.none() | st.integers(1, 2**50), width=st.integers(24, 200))
def test_bars_stay_inside_the_terminal(bars, limit, width):
    lines = format_limit_bars(bars, limit, width).splitlines()
    assert len(lines) == len(bars)
    assert all(display_width(line) <= max(width, 26) for line in lines)


@given(stretches=stretches, limit=st.none() | st.integers(1, 2**50), width=st.integers(1, 200))
def test_areas_stay_inside_the_terminal(stretches, limit, width):
    text = format_area(stretches, limit, width)
    assert all(display_width(line) <= width for line in text.splitlines())
    assert not text or text.count("\n") >= HEIGHT


def test_a_longer_bar_is_more_memory_and_the_limit_is_marked():
    drawn = format_limit_bars(
        [Bar(label="a", num_bytes=n * 2**30) for n in (1, 2, 4)], 3 * 2**30, 60
    ).splitlines()
    lengths = [line.count("█") for line in drawn]
    assert lengths == sorted(lengths) and len(set(lengths)) == 3
    marks = [line.index("│") for line in drawn]
    assert len(set(marks)) == 1
    assert [line.rstrip().endswith("█") for line in drawn] == [False, False, True]


def test_the_highest_moment_reaches_the_top_line():
    lines = format_area([("forward", [1, 2]), ("backward", [8, 4])], None, 60).splitlines()
    assert "█" in lines[0] and lines[-1].split() == ["forward", "backward"]
    phases = [("forward", [1] * 30), ("loss", [2]), ("backward", [1] * 30)]
    lines = format_area(phases, None, 40).splitlines()
    assert lines[-2].split() == ["forward", "l", "backward"] and lines[-1].split() == ["l:", "loss"]


@pytest.mark.parametrize("name", ["NO_COLOR", "TERM"])
def test_no_colour_where_none_is_wanted(name, monkeypatch):
    class Terminal(io.StringIO):
        encoding = "ascii"

        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    drawn = [Bar(label="a", num_bytes=8)]
    assert "\x1b" in format_limit_bars(drawn, 4, 60)
    monkeypatch.setenv(name, "dumb")
    assert format_limit_bars(drawn, 4, 60).isascii() and "\x1b" not in format_limit_bars(drawn, 4, 60)


def test_lengths_grow_until_they_no_longer_fit_and_include_the_plan_s():
    setup = TrainSetup(model="llama-3.1-8b", method="qlora", seq_len=3000)
    rows = by_length(setup, Machine(gpu=find_gpu("rtx-4090")))
    lengths = [row.seq_len for row in rows]
    assert 3000 in lengths and lengths == sorted(lengths)
    needed = [row.needed_bytes for row in rows]
    assert needed == sorted(needed)
    verdicts = [row.fit.verdict for row in rows]
    order = {"fits": 0, "tight": 1, "does-not-fit": 2}
    assert [order[v] for v in verdicts] == sorted(order[v] for v in verdicts) and verdicts[0] == "fits"


def test_estimate_by_length_prints_and_answers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    words = ["estimate", "llama-3.1-8b", "--gpu", "rtx-4090", "--method", "qlora", "--by-length"]
    assert run(words) == 0
    text = capsys.readouterr().out.partition("What fits by length")[2]
    plot = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(plot) > 4 and all(display_width(line) <= 60 for line in plot)
    assert run([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["by_length"]
    assert len(rows) == len(plot) and rows[0]["verdict"] == "fits"
