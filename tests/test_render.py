"""Tables: no number is ever broken or clipped, whatever the width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.render import (
    Column,
    blank_repeats,
    display_width,
    format_bar,
    format_bars,
    format_facts,
    format_json,
    format_table,
    paint,
    terminal_width,
    wrap,
)

cells = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=12)


@st.composite
def tables(draw: st.DrawFn) -> list[Column]:
    rows = draw(st.integers(1, 5))
    return [
        Column(
            title=f"title{i}",
            cells=tuple(draw(st.lists(cells, min_size=rows, max_size=rows))),
            is_number=draw(st.booleans()),
            drop=0 if i == 0 else draw(st.integers(0, 3)),
        )
        for i in range(draw(st.integers(1, 6)))
    ]


@given(tables(), st.integers(10, 120))
def test_a_table_fits_its_width_and_breaks_no_cell(columns: list[Column], width: int) -> None:
    text = format_table(columns, width)
    assert all(cell in text for c in columns if c.drop == 0 for cell in c.cells)
    shown = [c for c in columns if c.title in text.splitlines()[0]]
    if "-----" in text:
        assert max(map(len, text.splitlines())) <= width
        assert all(cell in text for c in shown for cell in c.cells)
    else:
        assert all(cell in text for c in columns for cell in c.cells)


@given(tables())
def test_without_a_width_nothing_is_dropped(columns: list[Column]) -> None:
    header = format_table(columns).splitlines()[0]
    assert all(c.title in header for c in columns)


def test_the_highest_drop_goes_first() -> None:
    columns = [
        Column(title="name", cells=("a" * 10,)),
        Column(title="soon", cells=("b" * 10,), drop=2),
        Column(title="late", cells=("c" * 10,), drop=1),
    ]
    assert format_table(columns, 34).splitlines()[0].split() == ["name", "soon", "late"]
    assert format_table(columns, 33).splitlines()[0].split() == ["name", "late"]
    assert format_table(columns, 12).splitlines()[0].split() == ["name"]
    assert format_table(columns, 9).splitlines()[0] == "a" * 10


def test_prose_is_wrapped_before_a_table_becomes_a_list() -> None:
    columns = [
        Column(title="n", cells=("12345",), is_number=True),
        Column(title="what", cells=("several words of prose " * 3,), is_prose=True),
    ]
    text = format_table(columns, 40)
    assert max(map(len, text.splitlines())) <= 40
    assert "-----" in text
    assert text.split().count("prose") == 3
    assert "-----" not in format_table(columns, 20)


def test_numbers_are_aligned_right() -> None:
    columns = [Column(title="n", cells=("7", "1234"), is_number=True), Column(title="w", cells=("x", "y"))]
    assert format_table(columns).splitlines()[2] == "   7  x"


def test_a_list_repeats_the_heading_that_a_group_left_blank() -> None:
    columns = [
        blank_repeats(Column(title="m", cells=("aa", "aa", "b"))),
        Column(title="v", cells=("1", "2", "3")),
    ]
    assert columns[0].cells == ("aa", "", "b")
    assert format_table(columns, 3).splitlines() == ["aa", "  v  1", "aa", "  v  2", "b", "  v  3"]


@given(st.floats(0, 1), st.integers(1, 40))
def test_a_bar_is_as_long_as_its_share(share: float, width: int) -> None:
    assert abs(len(format_bar(share, width)) - share * width) <= 1


def test_bars_keep_numbers_whole_on_a_narrow_terminal() -> None:
    lines = format_bars({"a": 1, "bb": 2}, {"a": "1.0 GiB", "bb": "12.0 GiB"}, 20).splitlines()
    assert [line.split()[1] for line in lines] == ["1.0", "12.0"]
    assert max(map(len, lines)) <= 20


def test_wide_letters_and_colours_are_measured_as_shown() -> None:
    assert display_width("显存") == 4
    assert display_width("\x1b[32mok\x1b[0m") == 2
    assert display_width("é") == display_width("é") == 1


def test_the_width_is_the_callers_or_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal_width() == 72
    monkeypatch.delenv("COLUMNS")
    assert terminal_width() is None


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert paint("fits", "good") != "fits"
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("fits", "good") == "fits"


def test_facts_are_wrapped_under_their_values() -> None:
    text = format_facts([("name", "word " * 20), ("n", "1")], 40)
    assert text.splitlines()[1].startswith("      word")
    assert text.splitlines()[-1] == "n     1"


@given(st.lists(cells, min_size=1, max_size=30))
def test_wrapping_keeps_every_word(words: list[str]) -> None:
    assert wrap(" ".join(words), 40, "# ", "  ").split()[1:] == words


def test_json_is_strict() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        format_json({"x": float("nan")})
