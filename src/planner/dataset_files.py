"""Training files as (line, record) pairs: JSON Lines, a JSON list, CSV. No record is interpreted here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from planner.errors import DataError


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one record, and what to do about it; `kind` groups faults: "json", "encoding", "format"."""

    message: str
    kind: str = "format"


Reader = Callable[[Path], Iterator[tuple[int, object]]]
"""A file as (line, record) pairs; a record that can't be read is a Fault. Raises DataError for a whole file."""

_MAX_CSV_FIELD_CHARS = 2**31 - 1
"""csv's own limit of 131072 characters is shorter than an ordinary document."""
MAX_LINE_BYTES = 2**26
"""A longer line is no training row, and parsing it would take several times its size of memory."""


def data_files(path: Path, suffixes: Iterable[str]) -> list[Path]:
    """The file itself, or a folder's data files at any depth in the order of their names. Raises DataError."""
    try:
        return _data_files(path, sorted(suffixes))
    except OSError as error:
        raise DataError(str(path), f"can't be read: {error.strerror or error}") from error


def _data_files(path: Path, accepted: list[str]) -> list[Path]:
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix.lower() in accepted and _is_visible(p, path)]
        if not found:
            raise DataError(str(path), f"the folder holds no data file ({', '.join(accepted)})")
        return sorted(found)
    if not path.exists():
        hint = "; download a hub data set as JSONL first" if ":" in path.name else ""
        raise DataError(str(path), f"no such file or folder{hint}")
    if path.suffix.lower() == ".parquet" and ".parquet" not in accepted:
        raise DataError(str(path), "Parquet needs pyarrow: pip install pyarrow, or convert the file to JSONL")
    if path.suffix.lower() not in accepted:
        raise DataError(str(path), f"unknown kind of file; accepted are {', '.join(accepted)}")
    return [path]


def read_json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """One JSON value per line; blank lines are skipped. A line that is no UTF-8, or too long, is a Fault."""
    for number, line in _lines(path):
        text = _decoded_or_fault(path, line, number)
        if isinstance(text, Fault):
            yield number, text
        elif text.strip():
            yield number, _parse_json(text)


def read_json(path: Path) -> Iterator[tuple[int, object]]:
    """A JSON list, or JSON Lines under the suffix .json."""
    with _opened(path) as file:
        starts_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return _read_json_list(path) if starts_list else read_json_lines(path)


def read_csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, object]]:
    """A table with a header line; a record's line is the one that it starts on."""
    import csv

    csv.field_size_limit(_MAX_CSV_FIELD_CHARS)
    table = csv.reader((line for _, line in _text_lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            cells = next(table, None)
        except csv.Error as error:
            raise DataError(str(path), f"broken CSV: {error}", start) from error
        if cells is None:
            return
        if header is None:
            header = cells
        elif cells:
            yield start, _csv_record(header, cells)
        start = table.line_num + 1


def read_tsv(path: Path) -> Iterator[tuple[int, object]]:
    """A table whose columns are separated by tabs."""
    return read_csv(path, delimiter="\t")


READERS: Mapping[str, Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
"""Readers by suffix."""


def count_records(path: Path) -> int:
    """Records of a file or of a folder's files, not one of them judged. Raises DataError, also where there is none."""
    counts = (_count_records(file) for file in data_files(path, READERS))
    total = sum(counts)
    if not total:
        raise DataError(str(path), "empty: there is no row in it")
    return total


def estimate_records(path: Path, readers: Mapping[str, Reader] = READERS) -> int:
    """About how many records a file or a folder holds, from the first MiB of each file; at least 1.

    Raises DataError. For progress bars and for drawing a sample: nothing may rest on the number being right.
    """
    return max(1, sum(map(_estimate_records, data_files(path, readers))))


def _estimate_records(file: Path) -> int:
    with _opened(file) as opened:
        head = opened.read(2**20)
    return round(head.count(b"\n") * max(1.0, file.stat().st_size / max(1, len(head))))


def _count_records(file: Path) -> int:
    """A line of JSON Lines is a record: parsing each would take most of the time of who only counts."""
    if READERS[file.suffix.lower()] is read_json_lines:
        with _opened(file) as opened:
            return sum(1 for line in opened if line.strip())
    return sum(1 for _ in READERS[file.suffix.lower()](file))


def _is_visible(path: Path, folder: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(str(path), f"can't be read: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines split at newlines only: JSON strings may hold other separators. Of a line that is too long, only
    MAX_LINE_BYTES + 1 bytes are given.
    """
    try:
        with _opened(path) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield number, line
                while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise DataError(str(path), f"can't be read: {error.strerror or error}") from error


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in _lines(path):
        text = _decoded_or_fault(path, line, number)
        if isinstance(text, Fault):
            raise DataError(str(path), text.message, number)
        yield number, text


def _decoded_or_fault(path: Path, line: bytes, number: int) -> str | Fault:
    if len(line) > MAX_LINE_BYTES:
        return Fault(
            f"a line of more than {MAX_LINE_BYTES // 2**20} MiB is no training row; split it into rows"
        )
    try:
        return _decode(path, line, number)
    except DataError as error:
        return Fault(str(error).removeprefix(f"{path}:{number}: "), "encoding")


def _decode(path: Path, data: bytes, first_line: int) -> str:
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        what = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte 0x{data[error.start]:02X}"
        fix = "save it as UTF-8, for example `iconv -f GB18030 -t UTF-8`"
        raise DataError(str(path), f"not UTF-8 ({what} at byte {column} of the line); {fix}", line) from error


def _parse_json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = f"broken JSON ({error.msg} at character {error.pos + 1}); each line must be one object"
        return Fault(message, "json")
    except (ValueError, RecursionError) as error:
        return Fault(f"JSON that can't be read ({str(error).splitlines()[0]})", "json")


def _read_json_list(path: Path) -> Iterator[tuple[int, object]]:
    with _opened(path) as file:
        text = _decode(path, file.read(), 1)
    decode = json.JSONDecoder().raw_decode
    line, counted, at = 1, 0, text.index("[") + 1
    while True:
        at = _skip_blanks(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            break
        try:
            record, at = decode(text, at)
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(str(path), f"broken JSON in this item of the list ({reason})", line) from error
        yield line, record
        at = _skip_blanks(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise DataError(str(path), "broken JSON: a comma or ] is missing after this item", line)
    if text[at + 1 :].strip():
        raise DataError(str(path), "text after the end of the JSON list", line)


def _skip_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _csv_record(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return Fault(
            f"{len(cells)} fields, but the header names {len(header)}; quote fields that hold commas"
        )
    return dict(zip(header, cells, strict=True))
