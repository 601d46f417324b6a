"""Measurements, and the append-only files that keep them: one self-contained JSON line per run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench import timeline
from bench.timeline import Stretch
from planner.errors import FinefitError
from planner.fields import FIELDS
from planner.files import append_line
from planner.setup import TrainSetup
from planner.units import format_bytes

SCHEMA_VERSION = 2
"""Of the lines written here. Version 1 is read too: it had no setup_id, timeline, watched, protocol and fewer figures."""

OUTCOMES = ("ok", "oom", "crash", "killed", "timeout")
MAX_LINE_BYTES = 2**22
"""A longer line is no record; usual ones have 20 kB."""
MAX_FILE_BYTES = 2**28
"""A larger file is refused before it is read: its records would not fit into a small machine's memory."""
MAX_RECORDS = 100_000
"""More are refused: each takes a kilobyte of memory and more, and no sweep writes as many."""
MAX_NUMBER = 2**63
MAX_VALUES, MAX_FILE_VALUES = 200_000, 2**23
"""Values in a record, which usually has some 1,500, and in a file: in memory a value of two characters takes up to a
hundred bytes."""
MAX_DEPTH = 32
"""Levels of lists and objects inside a line; a record has 7, with an inline config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Raw figures of each step, in order. Tokens are real ones: padding does not count; trained ones give a loss."""

    warmup_wall_s: tuple[float, ...] = ()
    step_wall_s: tuple[float, ...] = ()
    step_cpu_s: tuple[float, ...] = ()
    step_tokens: tuple[int, ...] = ()
    step_trained_tokens: tuple[int, ...] = ()
    losses: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the run took; None where this machine can't say.

    `peak_allocated_bytes`: live tensors, by torch.cuda or counted on the CPU. `peak_reserved_bytes`: the caching
    allocator (CUDA only). `device_used_bytes`: the process on the card by NVML; on the CPU its highest resident
    set during the steps, of which `freed_bytes` are freed memory that the C library keeps for later steps. `host_bytes`: the highest resident set of the whole run; `baseline_host_bytes`: after
    the imports, before the model.
    `phases`: peak of allocated bytes by phase. `terms`: bytes of weights, adapters, gradients and optimizer state.
    `step_s` is the median step with its 95 % interval (`low_step_s` to `high_step_s`), percentiles and `step_spread`
    (interquartile range / median); `cpu_step_s` is in CPU seconds. `first_step_s` holds compiling and first
    allocations; `eval_s` one batch of evaluation, `save_s` one checkpoint. `energy_per_step_j`: of card or processors.
    """

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    freed_bytes: int | None = None
    host_bytes: int | None = None
    baseline_host_bytes: int | None = None
    phases: Mapping[str, int] = field(default_factory=dict)
    terms: Mapping[str, int] = field(default_factory=dict)
    step_s: float | None = None
    low_step_s: float | None = None
    high_step_s: float | None = None
    p10_step_s: float | None = None
    p90_step_s: float | None = None
    step_spread: float | None = None
    cpu_step_s: float | None = None
    tokens_per_s: float | None = None
    trained_tokens_per_s: float | None = None
    first_step_s: float | None = None
    eval_s: float | None = None
    save_s: float | None = None
    energy_per_step_j: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run of one setup. `time_utc` is ISO 8601; `gpu` names the machine that the prediction was for.

    `outcome` is one of OUTCOMES; when it isn't "ok", `last_phase` says how far the run came, `error` why it
    ended in one line, and `stderr_tail` what it printed last. `device`: "cuda", "cpu", or "" if unknown.
    `environment`: versions, processor, driver, commit. `predicted`: the estimate's JSON, if one was given.
    `timeline`: live bytes along one step by phase; `watched`: columns over the run's seconds; `protocol`: how many
    steps were taken, and why no more.
    """

    id: str
    time_utc: str
    setup: TrainSetup
    gpu: str
    device: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    outcome: str
    last_phase: str | None = None
    error: str | None = None
    stderr_tail: str = ""
    samples: Samples = field(default_factory=Samples)
    measured: Measured = field(default_factory=Measured)
    predicted: Mapping[str, Any] | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    timeline: tuple[Stretch, ...] = ()
    watched: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome {self.outcome!r} is not one of {', '.join(OUTCOMES)}")
        for name in ("id", "time_utc", "gpu", "device", "stderr_tail"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is not a text")
        for name in ("last_phase", "error"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} is not a text")
        if not isinstance(self.predicted, Mapping | None):
            raise ValueError("predicted is not an object")

    @property
    def setup_id(self) -> str:
        """The same for equal setups, on every machine."""
        return setup_id(self.setup)

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; figures that aren't finite become null."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {
            "setup": self.setup.to_dict(),
            "samples": asdict(self.samples),
            "measured": asdict(self.measured),
            "timeline": timeline.to_json(self.timeline),
        }
        return {"schema_version": SCHEMA_VERSION, "setup_id": self.setup_id, **_finite(plain)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Measurement:
        """The record that `to_json` wrote. Raises ValueError, TypeError or SetupError in one line for others."""
        version = record.get("schema_version")
        if type(version) is not int or version not in range(1, SCHEMA_VERSION + 1):
            known = f"this finefit reads 1 to {SCHEMA_VERSION}"
            raise ValueError(f"schema_version {version!r:.20} is not known ({known})")
        values = {key: value for key, value in record.items() if key not in ("schema_version", "setup_id")}
        _check_keys(values, cls, required=("id", "time_utc", "setup", "gpu", "outcome"))
        return cls(
            **{
                **values,
                "setup": TrainSetup.from_dict(_mapping(values, "setup")),
                "samples": _samples(_mapping(values, "samples")),
                "measured": _measured(_mapping(values, "measured")),
                "environment": _mapping(values, "environment"),
                "protocol": _mapping(values, "protocol"),
                "timeline": timeline.from_json(values.get("timeline", [])),
                "watched": _columns(values),
                "warnings": _texts(values, "warnings"),
            }
        )


def setup_id(setup: TrainSetup) -> str:
    """12 hexadecimal digits that are the same for equal setups, whether a number was written 32 or 32.0."""
    plain = {
        name: float(value) if FIELDS[name].kind == "float" and value is not None else value
        for name, value in setup.to_dict().items()
    }
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


def check_appendable(path: Path) -> None:
    """Raise FinefitError before the work is done rather than after it; leaves no file that wasn't there."""
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise FinefitError(f"can't write {path}: {error.strerror or error}") from error


def append_result(path: Path, measurement: Measurement) -> None:
    """Add one line and fsync. A line that an earlier crash tore is ended first, so that it spoils no other."""
    line = json.dumps(measurement.to_json(), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    if _is_torn(path):
        append_line(path, "")
    append_line(path, line)


def read_results(path: Path) -> tuple[list[Measurement], list[str]]:
    """All records of a file in order, and one warning (with its line number) for each line that was left out.

    A shared case (`finefit submit`) is read as the record that it carries. The file is never changed. Raises FinefitError when it can't be read.
    """
    found: list[Measurement] = []
    warnings: list[str] = []
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) > MAX_FILE_BYTES:
                raise FinefitError(f"{path} is larger than {format_bytes(MAX_FILE_BYTES)}: split it first")
            file.seek(0)
            num_values = 0
            for number, line in enumerate(file, start=1):
                if number > MAX_RECORDS or num_values > MAX_FILE_VALUES:
                    what = f"{MAX_RECORDS} lines" if number > MAX_RECORDS else f"{MAX_FILE_VALUES:,} values"
                    raise FinefitError(f"{path} has more than {what}: split it first")
                problem, added = _read_line(line, found)
                num_values += added
                if problem:
                    warnings.append(f"{path.name}:{number}: left out: {problem}")
    except OSError as error:
        raise FinefitError(f"can't read {path}: {error.strerror or error}") from error
    return found, warnings


def _read_line(line: bytes, found: list[Measurement]) -> tuple[str | None, int]:
    """Add the line's record to `found`, or say in one line what is wrong with it; blank lines are fine. And how many
    values were added.
    """
    if not line.strip():
        return None, 0
    try:
        if len(line) > MAX_LINE_BYTES:
            raise ValueError("longer than any record")
        record = json.loads(line, parse_constant=_refuse_constant)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        if "schema_version" not in record and isinstance(record.get("record"), dict):
            record = record["record"]
        num_values = check_plain(record)
        found.append(Measurement.from_json(record))
    except (ValueError, TypeError, KeyError, RecursionError, FinefitError) as error:
        return _describe(error, is_whole=line.endswith(b"\n")), 0
    return None, num_values


def _describe(error: Exception, *, is_whole: bool) -> str:
    """Why a line is no record, in words for its owner."""
    if not is_whole:
        return "it was cut off while it was written"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no whole JSON value, as after a crash: {error.msg} at character {error.pos + 1}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply for a record"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _is_torn(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                return False
            file.seek(-1, 2)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False
    except OSError as error:
        raise FinefitError(f"can't read {path}: {error.strerror or error}") from error


def _check_keys(values: Mapping[str, Any], cls: type, required: tuple[str, ...] = ()) -> None:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    missing = sorted(set(required) - set(values))
    if unknown or missing:
        words = f"unknown keys: {', '.join(unknown)}" if unknown else f"missing keys: {', '.join(missing)}"
        raise ValueError(words)


def check_plain(value: Any, where: str = "record", depth: int = 0) -> int:
    """Refuse what no run measures and other programs can't read: infinities, integers beyond 64 bits, deep nesting, far
    too many values. How many values there are.

    `value` is what json.loads gave. Raises ValueError that says where.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{where[:60]}: nested too deeply for a record")
    items = value.values() if type(value) is dict else value if type(value) is list else (value,)
    numbers = [item for item in items if type(item) in (int, float)]
    if numbers and not (min(numbers) >= -MAX_NUMBER and max(numbers) <= MAX_NUMBER):
        raise ValueError(f"{where}: a figure this large is no measurement")
    count = len(items)
    if count > len(numbers):
        pairs = value.items() if type(value) is dict else ((None, item) for item in items)
        for key, item in pairs:
            if type(item) in (dict, list):
                count += check_plain(item, where if key is None else f"{where}.{key}", depth + 1)
    if count > MAX_VALUES:
        raise ValueError(f"{where[:60]}: more than {MAX_VALUES:,} values are no record")
    return count


def _texts(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = values.get(key, [])
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ValueError(f"{key} is not a list of texts")
    return tuple(found)


def _columns(values: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
    found = _mapping(values, "watched")
    if (
        not all(isinstance(column, list) for column in found.values())
        or len(set(map(len, found.values()))) > 1
    ):
        raise ValueError("watched is not a table of columns of one length")
    return found


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{key} is not an object")
    return found


def _samples(values: Mapping[str, Any]) -> Samples:
    _check_keys(values, Samples)
    for key, items in values.items():
        if not isinstance(items, list):
            raise ValueError(f"samples.{key} is not a list")
        for item in items:
            _check_figure(f"samples.{key}", item, may_be_negative=key == "losses")
    return Samples(**{key: tuple(items) for key, items in values.items()})


def _measured(values: Mapping[str, Any]) -> Measured:
    _check_keys(values, Measured)
    tables = {key: _mapping(values, key) for key in ("phases", "terms")}
    figures = {key: value for key, value in values.items() if key not in tables}
    for table in (*tables.values(), figures):
        for key, item in table.items():
            _check_figure(f"measured.{key}", item)
    return Measured(**{**figures, **tables})


def _check_figure(where: str, value: Any, *, may_be_negative: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or (value < 0 and not may_be_negative):
        raise ValueError(f"{where}: {value!r} is no measurement")


def _finite(value: Any) -> Any:
    """Plain JSON values; NaN and infinities (a diverged loss) become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
