from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.dataset import Message, content_sha256, dataset_facts, iter_rows, nearest_rank, read_rows
from planner.dataset_files import count_records
from planner.dataset_formats import FORMATS
from planner.errors import DataError

ALPACA = {"instruction": "Translate", "input": "今天天气真好", "output": "Nice weather."}
CONVERSATION = (Message(role="user", content="Hi"), Message(role="assistant", content="Hello!"))


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def complaint(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert message.startswith(str(caught.value.path)), "names the file"
    assert "\n" not in message, "one line"
    with pytest.raises(DataError):
        list(iter_rows(path))
    return message.removeprefix(str(path))


SAME_CONVERSATION = {
    "messages": {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            {"role": "assistant", "content": "Hello!"},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello!"},
    "alpaca without input": {"instruction": "Hi", "output": "Hello!", "text": "ignored", "input": None},
    "dolly": {"instruction": "Hi", "context": "", "response": "Hello!", "category": "chat"},
    "prompt-completion": {"prompt": "Hi", "completion": "Hello!"},
    "prompt-response": {"prompt": "Hi", "response": "Hello!"},
    "question-answer": {"question": "Hi", "answer": "Hello!"},
}


@pytest.mark.parametrize("record", SAME_CONVERSATION.values(), ids=SAME_CONVERSATION)
def test_every_format_says_the_same(tmp_path: Path, record: object) -> None:
    [row] = read_rows(write_lines(tmp_path / "d.jsonl", record))
    assert row.messages == CONVERSATION
    assert row.text is None


def test_every_format_is_tried_here() -> None:
    assert {f.name for f in FORMATS} - {"text"} <= {*SAME_CONVERSATION, *SAME_PAIR}


USER, CHOSEN, REJECTED = (
    {"role": role, "content": text}
    for role, text in (("user", "Hi"), ("assistant", "Hello!"), ("assistant", "No."))
)
SAME_PAIR = {
    "prompt-preference": {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
    "prompt-preference of turns": {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED], "score": 1},
    "prompt and conversations": {"prompt": "Hi", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
    "preference": {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
    "alpaca-preference": {"instruction": "Hi", "input": "", "chosen": "Hello!", "rejected": "No."},
    "sharegpt-preference": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello!"},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "question-preference": {"question": "Hi", "system": "", "chosen": "Hello!", "rejected": "No."},
    "question-response-preference": {
        "question": "Hi",
        "response_chosen": "Hello!",
        "response_rejected": "No.",
        "history": [],
    },
    "messages-preference": {"messages": [USER, CHOSEN], "rejected_response": "No."},
}


@pytest.mark.parametrize("record", SAME_PAIR.values(), ids=SAME_PAIR)
def test_every_format_of_pairs_says_the_same(tmp_path: Path, record: object) -> None:
    [row] = read_rows(write_lines(tmp_path / "d.jsonl", record))
    assert row.messages == CONVERSATION
    assert row.rejected == (CONVERSATION[0], Message(role="assistant", content="No."))
    assert [sequence.messages for sequence in row.sequences] == [row.messages, row.rejected]
    assert row.num_chars == len("HiHello!HiNo.")
    assert row.num_answer_chars == len("Hello!No.")


def test_instruction_and_input_become_one_turn(tmp_path: Path) -> None:
    [row] = read_rows(write_lines(tmp_path / "d.jsonl", ALPACA))
    assert [m.content for m in row.messages or ()] == ["Translate\n\n今天天气真好", "Nice weather."]


def test_system_and_history_come_first(tmp_path: Path) -> None:
    record = ALPACA | {"system": "Be brief.", "history": [["a", "b"]]}
    [row] = read_rows(write_lines(tmp_path / "d.jsonl", record))
    assert [m.role for m in row.messages or ()] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.content for m in row.messages or ()][:3] == ["Be brief.", "a", "b"]


def test_plain_texts(tmp_path: Path) -> None:
    [row] = read_rows(write_lines(tmp_path / "d.jsonl", {"text": "Once upon a time"}))
    assert (row.messages, row.text, row.line) == (None, "Once upon a time", 1)


def test_files_of_each_kind_hold_the_same_rows(tmp_path: Path) -> None:
    records = [ALPACA, {"instruction": 'say "a,b"', "input": "two\nlines", "output": "ok\u2028then"}]
    write_lines(tmp_path / "a.jsonl", *records)
    (tmp_path / "b.json").write_text(json.dumps(records, indent=2), encoding="utf-8")
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    for name, delimiter in (("d.csv", ","), ("e.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(ALPACA), delimiter=delimiter)
            table.writeheader()
            table.writerows(records)
    contents = [[row.messages for row in read_rows(path)] for path in sorted(tmp_path.iterdir())]
    assert len(contents) == 5
    assert all(content == contents[0] for content in contents)


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", {"text": "second"})
    write_lines(tmp_path / "a.jsonl", {"text": "first"})
    write_lines(tmp_path / ".hidden.jsonl", {"text": "no"})
    (tmp_path / "README.md").write_text("about")
    assert [row.text for row in iter_rows(tmp_path)] == ["first", "second"]


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}')
    (tmp_path / "d.json").write_text('[\n{"text": "a"},\n\n  {"text":\n "b"}]')
    (tmp_path / "d.csv").write_text('text\n"a\nb"\nc\n')
    assert [row.line for row in read_rows(tmp_path / "d.jsonl")] == [2, 4]
    assert [row.line for row in read_rows(tmp_path / "d.json")] == [2, 4]
    assert [row.line for row in read_rows(tmp_path / "d.csv")] == [2, 4]


FAULTS = {
    "empty file": (b"", "", "empty"),
    "blank lines only": (b"\n \n", "", "empty"),
    "header only": (b"text\n", "", "empty"),
    "not UTF-8": ('{"text": "好"}\n{"text": "b"}\n'.encode("gb18030"), ":1: ", "byte 0xBA at byte 11"),
    "not UTF-8 later": (b'{"text": "a"}\n{"text": "\xff"}\n', ":2: ", "byte 0xFF at byte 11"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), ":1: ", "UTF-16"),
    "broken line": (b'{"text": "a"}\n{"text": "b"\n', ":2: ", "broken JSON"),
    "not an object": (b'{"text": "a"}\n[1]\n', ":2: ", "not a JSON object"),
    "unknown columns": (b'{"q": 1, "a": 2}\n', ":1: ", "columns q, a; accepted: messages"),
    "no columns": (b"{}\n", ":1: ", "(none)"),
    "missing column": (b'{"text": "a"}\n{"txt": "b"}\n', ":2: ", "no column text (format text); found txt"),
    "mixed formats": (b'{"text": "a"}\n{"prompt": "b", "completion": "c"}', ":2: ", "mixed formats"),
    "empty text": (b'{"text": " "}\n', ":1: ", "text is empty"),
    "empty answer": (b'{"prompt": "b", "completion": "\\n"}', ":1: ", "(completion) is empty"),
    "null answer": (b'{"prompt": "b", "completion": null}', ":1: ", "(completion) is empty"),
    "empty prompt": (b'{"prompt": "", "completion": "c"}', ":1: ", "(prompt) is empty"),
    "number": (b'{"prompt": "b", "completion": 42}', ":1: ", "completion must be text, not a number"),
    "surrogate": (b'{"text": "\\ud800"}', ":1: ", "surrogate"),
    "turns no list": (b'{"messages": "hi"}', ":1: ", "messages must be a list of turns, not text"),
    "turn no object": (b'{"messages": ["hi"]}', ":1: ", "turn 1 is text"),
    "unknown role": (b'{"messages": [{"role": "cat", "content": "x"}]}', ":1: ", "role 'cat'; known are"),
    "no assistant": (b'{"messages": [{"role": "user", "content": "x"}]}', ":1: ", "no assistant turn"),
    "no turns": (b'{"conversations": []}', ":1: ", "no assistant turn"),
    "empty turn": (
        b'{"conversations": [{"from": "gpt", "value": ""}]}',
        ":1: ",
        "turn 1, an answer, is empty",
    ),
    "picture": (
        b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        ":1: ",
        "other than text",
    ),
    "same answers": (b'{"prompt": "b", "chosen": "c", "rejected": "c"}', ":1: ", "nothing to prefer"),
    "no common prompt": (
        b'{"chosen": [{"role": "assistant", "content": "c"}], "rejected": [{"role": "assistant", "content": "d"}]}',
        ":1: ",
        "don't begin with the same prompt",
    ),
    "answers without a prompt": (
        b'{"chosen": "c", "rejected": "d"}',
        ":1: ",
        "must be a list of turns, not text",
    ),
    "empty rejected": (b'{"prompt": "b", "chosen": "c", "rejected": " "}', ":1: ", "(rejected) is empty"),
    "pair ends with a question": (
        b'{"prompt": "b", "chosen": "c", "rejected": [{"role": "user", "content": "b"}]}',
        ":1: ",
        "must both end with an answer",
    ),
    "deep": (b"[" * 200_000, ":1: ", "can't be read"),
    "huge number": (b'{"text": ' + b"1" * 5000 + b"}", ":1: ", "can't be read"),
}


@pytest.mark.parametrize(("content", "where", "what"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_line(tmp_path: Path, content: bytes, where: str, what: str) -> None:
    path = tmp_path / ("d.csv" if content == b"text\n" else "d.jsonl")
    path.write_bytes(content)
    message = complaint(path)
    assert message.startswith(where or ": ")
    assert what in message


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("d.json", '[{"text": "a"},\n{"text": }]', ":2: ", "broken JSON"),
        ("d.json", '[{"text": "a"}\n{"text": "b"}]', ":1: ", "a comma or ] is missing"),
        ("d.json", '[{"text": "a"}] x', ":1: ", "after the end"),
        ("d.json", '[{"text": "a"},', ":1: ", "broken JSON"),
        ("d.json", '[\n"a"]', ":2: ", "not a JSON object"),
        ("d.json", "[]", ": ", "empty"),
        ("d.csv", "prompt,completion\na,b\nc,d,e\n", ":3: ", "3 fields, but the header names 2"),
        ("d.csv", 'prompt,completion\na,"b\n', ":2: ", "broken CSV"),
        ("d.csv", "prompt;completion\na;b\n", ":2: ", "columns prompt;completion"),
        ("d.parquet", "PAR1", ": ", "pip install pyarrow"),
        ("d.docx", "PK", ": ", "unknown kind of file; accepted are .csv, .json"),
    ],
)
def test_faults_of_other_kinds_of_file(
    tmp_path: Path, name: str, content: str, where: str, what: str
) -> None:
    (tmp_path / name).write_text(content)
    message = complaint(tmp_path / name)
    assert message.startswith(where)
    assert what in message


def test_all_faulty_rows_are_listed_at_once(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "" if i % 3 == 0 else "x"} for i in range(30)]
    message = complaint(write_lines(tmp_path / "d.jsonl", *rows))
    assert message.startswith(":1: ")
    assert message.endswith("(9 more faulty rows: lines 4, 7, 10, 13, 16, …)")


def test_places_that_hold_no_data(tmp_path: Path) -> None:
    assert "no such file" in complaint(tmp_path / "none.jsonl")
    assert "holds no data file" in complaint(tmp_path)
    assert "download" in complaint(tmp_path / "squad:train")
    assert "can't be read" in complaint(tmp_path / ("x" * 5000 + ".jsonl"))


def test_more_kinds_of_file_can_be_plugged_in(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    rows = read_rows(tmp_path, readers={".parquet": lambda path: iter([(1, {"text": path.name})])})
    assert [row.text for row in rows] == ["d.parquet"]


def test_facts(tmp_path: Path) -> None:
    records = [{"prompt": "ab", "completion": "c" * n, "id": n} for n in (1, 2, 2, 96)]
    path = write_lines(tmp_path / "d.jsonl", *records)
    facts = dataset_facts(path)
    assert (facts.format, facts.num_files, facts.num_rows) == ("prompt-completion", 1, 4)
    assert facts.num_duplicate_rows == 1
    assert facts.ignored_columns == ("id",)
    assert (facts.total_chars, facts.answer_chars) == (109, 101)
    assert (facts.p50_chars, facts.p90_chars, facts.max_chars) == (4, 98, 98)
    assert facts.sha256 == content_sha256(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"text": "a"}\n\n  \n{"text": "b"}'),
        ("a.json", '[{"text": "a"}, {"text": "b"}]'),
        ("a.csv", "text\na\nb\n"),
    ],
)
def test_records_are_counted_as_they_are_read(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert count_records(path) == len(read_rows(path)) == 2
    assert count_records(tmp_path) == 2


def test_counting_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        count_records(tmp_path / "a.jsonl")


def test_the_hash_sees_names_borders_and_bytes(tmp_path: Path) -> None:
    hashes = set()
    for number, parts in enumerate([("ab", "c"), ("a", "bc"), ("ab", "d")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in zip(("x.jsonl", "y.jsonl"), parts, strict=True):
            (folder / name).write_text(text)
        hashes.add(content_sha256(folder))
    assert len(hashes) == 3


@given(st.lists(st.integers(), min_size=1), st.floats(0.01, 1))
def test_nearest_rank_is_reached_by_that_share(values: list[int], share: float) -> None:
    at = nearest_rank(sorted(values), share)
    assert at in values
    assert sum(v <= at for v in values) >= round(share * len(values), 6)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
COLUMNS = st.sampled_from(sorted({c for f in FORMATS for c in (*f.required, *f.optional)}))
TURNS = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "from", "content", "value"]), JSON_VALUES | st.just("assistant")
    ),
    max_size=3,
)
RECORDS = st.dictionaries(COLUMNS, JSON_VALUES | TURNS, max_size=4)


def rows_or_data_error(path: Path) -> None:
    try:
        rows = read_rows(path)
    except DataError as error:
        assert "\n" not in str(error).removeprefix(error.path)
        return
    assert rows
    for row in rows:
        assert (row.messages is None) != (row.text is None)
        assert row.num_chars > 0
        if row.messages is not None:
            assert any(m.role == "assistant" and m.content.strip() for m in row.messages)
        if row.rejected is not None:
            assert row.rejected != row.messages
            assert row.rejected[0] == (row.messages or ())[0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]), st.binary(max_size=200))
def test_any_bytes_are_rows_or_a_data_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"d{suffix}"
    path.write_bytes(content)
    rows_or_data_error(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(JSON_VALUES | RECORDS, max_size=4), st.booleans())
def test_any_json_is_rows_or_a_data_error(tmp_path: Path, records: list[object], as_list: bool) -> None:
    path = tmp_path / ("d.json" if as_list else "d.jsonl")
    path.write_text(json.dumps(records) if as_list else "".join(json.dumps(r) + "\n" for r in records))
    rows_or_data_error(path)
