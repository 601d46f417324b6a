from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.cli import run
from bench.data import load_rows, tokenize_rows
from bench.data_inspect import inspect
from bench.data_masks import first_masks
from bench.data_personal import KINDS, redact
from bench.data_similar import SIMILAR, shingles, similar_rows
from bench.data_text import format_inspection
from planner.dataset import Row, read_rows
from planner.dataset_formats import FORMATS
from planner.dataset_preferences import PREFERENCES
from planner.errors import DataError
from planner.planfile import PlanFile
from tiny_llama import CONFIG, save_tiny_model, tiny_setup, write_rows

pytestmark = pytest.mark.train

WORDS = [f"{a}{b}" for a in ("al", "be", "cor", "du", "fen") for b in ("ma", "ri", "to", "wek", "zul", "go")]


def pair(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def preference(question: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def write_lines(path: Path, *lines: object) -> Path:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def sentence(seed: int, num_words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


# ------------------------------------------------------------- what is found


def test_what_was_planted_is_found(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "d.jsonl",
        pair("first", sentence(1)),
        pair("second", "Write to ada@example.org or call +49 170 1234567."),
        pair("first", sentence(1)),
        pair("first", sentence(1) + " almost"),
        b'{"prompt": "broken"',
        b'{"prompt": "\xff", "completion": "x"}',
        pair("empty", " "),
        {"prompt": "a", "answer": "b"},
        pair("damaged", "caf\u00c3\u00a9 and \ufffd"),
        pair("bell", "\x07 ding"),
        b"[" * 100_000,
        b'{"prompt": ' + b"9" * 5000 + b', "completion": "x"}',
        b'{"prompt": "nul", "completion": "\x00"}',
    )
    found = inspect(path)
    assert (found.format, found.num_rows) == ("prompt-completion", 6)
    assert {kind: fault.num_rows for kind, fault in found.faults.items()} == {
        "json": 4,
        "encoding": 1,
        "empty": 1,
        "format": 1,
    }
    assert found.exact_duplicates.first == (f"{path}:3 repeats {path}:1",)
    assert found.near_duplicates.first == (f"{path}:4 repeats {path}:1",)
    assert {kind: one.num_rows for kind, one in found.personal.items()} == {"email": 1, "phone": 1}
    assert set(found.encoding) == {"control character", "replacement character", "wrongly decoded letters"}
    assert found.tokens is None


def test_rows_of_the_evaluation_file_are_found(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", *(pair("q", sentence(n)) for n in range(30)))
    held_out = write_lines(
        tmp_path / "eval.jsonl",
        pair("q", sentence(7)),
        pair("q", sentence(8) + " more"),
        pair("q", sentence(99)),
        pair("q", sentence(99)),
    )
    overlap = inspect(train, eval_path=held_out).overlap
    assert overlap is not None
    assert (overlap.num_rows, overlap.exact.first) == (4, (f"{held_out}:1",))
    assert overlap.near.first == (f"{held_out}:2",)


def test_tokens_are_those_of_a_run(tmp_path: Path, model: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", 60)
    setup = tiny_setup(model=str(model), from_scratch=False, seq_len=28)
    found = inspect(path, setup)
    from bench.weights import load_tokenizer

    facts = tokenize_rows(load_rows(path), load_tokenizer(setup), seq_len=28).facts
    tokens = found.tokens
    assert tokens is not None
    assert tokens.num_truncated_rows == facts.num_truncated_rows > 0
    assert tokens.num_lost_answer_tokens == facts.num_lost_answer_tokens > 0
    assert tokens.num_answer_tokens == facts.num_trained_tokens + facts.num_lost_answer_tokens
    assert sum(rows for _, _, rows in tokens.lengths.histogram) == tokens.lengths.num_rows == 60
    assert not found.findings


def test_a_sample_is_drawn_evenly(tmp_path: Path, model: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", 400)
    found = inspect(path, tiny_setup(model=str(model), from_scratch=False), sample_rows=100)
    assert found.tokens is not None
    assert found.tokens.lengths.num_rows == found.num_language_rows
    assert 90 <= found.num_language_rows <= 110
    assert "drawn evenly" in found.notes[0]


def test_without_a_tokenizer_lengths_are_in_characters(tmp_path: Path) -> None:
    found = inspect(write_rows(tmp_path / "d.jsonl"), tiny_setup(model="meta-llama/Llama-3.1-8B"))
    assert found.tokens is None
    assert found.characters is not None
    assert found.characters.unit == "characters"
    assert "no token is counted, lengths are in characters" in found.notes[0]


def test_languages_are_told(tmp_path: Path) -> None:
    texts = [
        "The weather is fine today and we go out.",
        "今天天气很好,我们一起出去走走吧。",
        "Das Wetter ist heute wirklich schön.",
    ]
    found = inspect(write_lines(tmp_path / "d.jsonl", *({"text": text} for text in texts)))
    assert set(found.languages) == {"en", "zh", "de"}


@pytest.mark.parametrize(
    ("kind", "text", "other"),
    [
        ("email", "ada.l+x@mail.example.org", "ada at example.org"),
        ("phone", "+49 170 1234567", "2024-01-01 12:00:00"),
        ("card", "4111 1111 1111 1111", "4111 1111 1111 1112"),
        ("iban", "GB82 WEST 1234 5698 7654 32", "GB82 WEST 1234 5698 7654 33"),
        ("resident-id", "11010519491231002X", "110105194912310021"),
        ("social-security", "536-22-1234", "000-22-1234"),
        ("secret", "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "hf_short"),
    ],
)
def test_personal_strings_are_told_by_look_and_check_digits(kind: str, text: str, other: str) -> None:
    assert kind in {k.name for k in KINDS}
    assert redact(f"see {text}.") == (f"see <{kind.upper()}>.", {kind: 1})
    assert redact(f"see {other}.") == (f"see {other}.", {})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=30, max_size=60), st.integers(0, 29), st.booleans())
def test_similar_rows_are_those_whose_words_are_alike(words: list[str], at: int, change: bool) -> None:
    changed = [*words[:at], "other", *words[at + 1 :]] if change else words[::-1]
    rows = [Row(text=" ".join(text), line=n, path="d") for n, text in enumerate((words, changed))]
    first, second = (set(shingles(row)) for row in rows)
    alike = len(first & second) / len(first | second)
    with similar_rows() as index:
        for row in rows:
            index.add(row)
        found = index.near_firsts().tolist() == [0, 0]
    if abs(alike - SIMILAR) > 0.18:  # four standard errors of the estimate
        assert found == (alike > SIMILAR)


@pytest.mark.slow
def test_memory_grows_by_a_few_bytes_a_row(tmp_path: Path) -> None:
    peaks = []
    for num_rows in (3_000, 30_000):
        path = write_lines(tmp_path / f"{num_rows}.jsonl", *(pair("q", sentence(n)) for n in range(num_rows)))
        inspect(write_lines(tmp_path / "d.jsonl", pair("q", sentence(0))))  # loads what is loaded once
        tracemalloc.start()
        inspect(path, sample_rows=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 60 * 27_000


# ------------------------------------------------------------- what stops a run


def test_a_run_stops_before_the_model_is_built(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench.train

    def build(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("built a model for data that can't be trained on")

    monkeypatch.setattr(bench.train, "build_model", build)
    setups = {
        r"largest id is \d+, but the embedding has 50 rows": {"model": CONFIG | {"vocab_size": 50}},
        "have nothing to train within seq_len 8": {"seq_len": 8},
    }
    for number, (message, changes) in enumerate(setups.items()):
        data = str(write_rows(tmp_path / "d.jsonl"))
        setup = tiny_setup(**{"tokenizer": str(model), "data": data, **changes})
        with pytest.raises(DataError, match=message):
            bench.train.train(PlanFile(setup=setup), tmp_path / str(number), progress=False)


def test_the_command_shows_what_would_stop_a_run(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_rows(tmp_path / "d.jsonl"))
    assert run(["data", "inspect", path, "--model", str(model), "--seq-len", "8", "--json"]) == 3
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [f["audit"] for f in findings] == ["untrained-rows", "end-of-turn"]
    assert run(["data", "inspect", path, "--model", str(model), "--show-mask", "1"]) == 0
    shown = capsys.readouterr().out
    assert "⟦0 yes<|im_end|>⟧" in shown.replace("\n", "")
    assert "tokens per row" in shown


def test_show_mask_needs_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_rows(tmp_path / "d.jsonl"))
    assert run(["data", "inspect", path, "--show-mask", "1"]) == 2
    assert run(["data", "inspect", path, "--show-mask", "1", "--model", "meta-llama/Llama-3.1-8B"]) == 1
    assert "--show-mask needs the tokenizer" in capsys.readouterr().err


# ------------------------------------------------------------- new files


def test_clean_leaves_every_row_once_and_is_its_own_result(tmp_path: Path) -> None:
    rows = [pair("q", sentence(n)) for n in range(5)]
    near = pair("q", sentence(0) + " almost")
    path = write_lines(tmp_path / "d.jsonl", *rows, rows[2], near, b"{", pair("q", " "))
    held_out = write_lines(tmp_path / "eval.jsonl", rows[4])
    out = tmp_path / "out.jsonl"
    assert run(["data", "clean", str(path), "--out", str(out), "--near", "--without", str(held_out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows[:4]
    again = tmp_path / "again.jsonl"
    assert run(["data", "clean", str(out), "--out", str(again), "--near"]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_clean_redacts_at_any_depth(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "I am ada@example.org"},
        {"role": "assistant", "content": "Hi ada@example.org"},
    ]
    path = write_lines(tmp_path / "d.jsonl", {"messages": turns})
    out = tmp_path / "out.jsonl"
    assert run(["data", "clean", str(path), "--out", str(out), "--redact"]) == 0
    [row] = read_rows(out)
    assert [m.content for m in row.messages or ()] == ["I am <EMAIL>", "Hi <EMAIL>"]


@pytest.mark.parametrize("name", [f.name for f in FORMATS if f.name != "text"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_every_format_can_be_written_and_read_back(
    tmp_path: Path, name: str, suffix: str, capsys: Any
) -> None:
    rows = [('say "a,b"\tto\nme', "ok, then"), ("今天", "好")]
    is_paired = any(f.name == name for f in PREFERENCES)
    lines = [preference(*row, "no") if is_paired else pair(*row) for row in rows]
    path = write_lines(tmp_path / "d.jsonl", *lines)
    out = tmp_path / f"out{suffix}"
    code = run(["data", "convert", str(path), "--to", name, "--out", str(out)])
    if suffix in (".csv", ".tsv") and name in NESTED:
        assert code == 1
        assert not out.exists()
        return
    assert code == 0
    assert [row.content for row in read_rows(out)] == [row.content for row in read_rows(path)]


NESTED = ("messages", "sharegpt", "preference", "sharegpt-preference", "messages-preference")
"""Formats with lists or objects in a column."""


def test_pairs_are_counted_and_looked_at_as_dpo_trains_them(tmp_path: Path, model: Path) -> None:
    path = write_lines(
        tmp_path / "d.jsonl",
        preference("one", "yes", "no"),
        preference("two", "yes " * 40, "no"),
        preference("three", "yes " * 40, "no " * 60),
        preference("same", "yes", "yes"),
    )
    setup = tiny_setup(model=str(model), seq_len=80)
    found = inspect(path, setup)
    assert (found.num_rows, found.num_pairs, found.tokens.num_truncated_rows) == (3, 3, 2)
    assert (found.tokens.num_truncated_pairs, found.faults["same"].num_rows) == (1, 1)
    assert found.findings == ()
    text = format_inspection(found)
    assert "3 rows with a chosen and a rejected answer" in text and "chosen and rejected are one" in text
    masks = first_masks(path, setup, num_rows=1)
    assert [mask.splitlines()[-1] for mask in masks] == ["⟦yes<|im_end|>⟧", "⟦no<|im_end|>⟧"]


def test_a_pair_becomes_no_single_answer(tmp_path: Path, capsys: Any) -> None:
    path = write_lines(tmp_path / "d.jsonl", preference("a", "b", "c"))
    assert run(["data", "convert", str(path), "--to", "messages", "--out", str(tmp_path / "o.jsonl")]) == 1
    assert "needs a format that holds both" in capsys.readouterr().err


def test_what_a_format_cannot_hold_is_an_error_and_leaves_what_was_there(tmp_path: Path, capsys: Any) -> None:
    turns = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    path = write_lines(tmp_path / "d.jsonl", {"messages": turns[:2]}, {"messages": turns})
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    arguments = ["data", "convert", str(path), "--out", str(out), "--to"]
    assert run([*arguments, "dolly"]) == 2
    assert "--force" in capsys.readouterr().err
    assert run([*arguments, "dolly", "--force"]) == 1
    assert f"{path}:2: 2 questions in one row" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert run([*arguments, "alpaca", "--force"]) == 0
    assert [row.messages for row in read_rows(out)] == [row.messages for row in read_rows(path)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl", "out.jsonl"]


def test_split_keeps_what_is_alike_together_and_depends_on_content_alone(tmp_path: Path) -> None:
    rows = [pair("q", sentence(n)) for n in range(60)]
    rows += [pair("q", sentence(n) + " almost") for n in range(60)]
    sides = []
    for number, order in enumerate((rows, rows[:60][::-1] + rows[60:])):
        path = write_lines(tmp_path / f"{number}.jsonl", *order)
        folder = tmp_path / f"parts{number}"
        assert run(["data", "split", str(path), "--out", str(folder), "--eval-fraction", "0.3"]) == 0
        sides.append(
            [
                {row["completion"] for row in map(json.loads, (folder / name).read_text().splitlines())}
                for name in ("train.jsonl", "eval.jsonl")
            ]
        )
    assert sides[0] == sides[1]
    train, held_out = sides[0]
    assert len(train) + len(held_out) == 120
    assert 15 <= len(held_out) <= 60
    assert not {text.removesuffix(" almost") for text in train} & {
        text.removesuffix(" almost") for text in held_out
    }


# ------------------------------------------------------------- hostile files

HOSTILE = st.sampled_from(
    [
        b"[" * 5000,
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
        b'{"prompt": "q", "completion": "a", "deep": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"text": 1e400}',
        b'{"text": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\u0000", "completion": "\\u0000\\u202e<|im_end|>"}',
        b'{"prompt": "\x00", "completion": "b"}',
        "{'prompt': 'python'}".encode("utf-16"),
        '{"prompt": "好", "completion": "好"}'.encode("gb18030"),
        b'{"prompt": "<script>alert(1)</script>", "completion": "<|im_start|>\\u001b[31m"}',
        b'{"prompt": "\\ud800", "completion": "b"}',
        b'{"prompt": "a", "completion": "b"}',
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        b'{"messages": [{"role": "assistant", "content": "b"}, {"role": "tool", "content": null}]}',
        b'{"text": "plain"}',
        b'prompt,completion\n"a,b',
        b'[{"prompt": "a", "completion": "b"},',
        b"\xef\xbb\xbf{}",
        b"NaN",
        b"\r",
    ]
)
FILES = st.tuples(
    st.lists(
        HOSTILE | st.binary(max_size=60) | st.text(max_size=40).map(lambda s: s.encode(errors="replace")),
        max_size=6,
    ),
    st.sampled_from([b"\n", b"\r\n", b""]),
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]),
)
COMMANDS = st.sampled_from(
    [
        ("inspect",),
        ("inspect", "--model", "MODEL", "--seq-len", "24", "--show-mask", "2"),
        ("inspect", "--model", "MODEL", "--objective", "pretrain", "--eval", "FILE", "--json"),
        ("clean", "--near", "--redact", "--out", "OUT/o.jsonl"),
        ("clean", "--without", "FILE", "--out", "OUT/o.jsonl"),
        ("convert", "--to", "messages", "--out", "OUT/o.jsonl"),
        ("convert", "--to", "alpaca", "--out", "OUT/o.csv"),
        ("split", "--eval-fraction", "0.5", "--out", "OUT"),
    ]
)


def check_hostile(folder: Path, model: Path, capsys: Any, file: Any, command: tuple[str, ...]) -> None:
    """A report or one line of error; what is written can be read, and what isn't finished isn't there."""
    lines, newline, suffix = file
    path, out = folder / f"d{suffix}", folder / "out"
    path.write_bytes(newline.join(lines))
    words = {"MODEL": str(model), "FILE": str(path)}
    named = [words.get(word, word.replace("OUT", str(out))) for word in command]
    code = run(["data", named[0], str(path), *named[1:]])
    captured = capsys.readouterr()
    assert code in (0, 1, 3), captured.err
    assert "unexpected error" not in captured.err
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.out
    written = sorted(out.iterdir()) if out.exists() else []
    assert code == 0 or not written
    for one in written:
        assert not one.name.startswith(".")
        read_rows(one)
        one.unlink()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(FILES, COMMANDS)
def test_hostile_files_give_a_report_or_one_line(
    tmp_path: Path, model: Path, capsys: Any, file: Any, command: Any
) -> None:
    check_hostile(tmp_path, model, capsys, file, command)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=2000)
@given(FILES, COMMANDS)
def test_two_thousand_hostile_files(
    tmp_path: Path, model: Path, capsys: Any, file: Any, command: Any
) -> None:
    check_hostile(tmp_path, model, capsys, file, command)
