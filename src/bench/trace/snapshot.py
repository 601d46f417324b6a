"""Snapshots of torch's CUDA allocator as files. No torch.

A snapshot is what `torch.cuda.memory._dump_snapshot(FILE)` pickles, or the same object as JSON: `segments` (the state
at its end), `device_traces` (what happened before, if `_record_memory_history` was on) and `allocator_settings`. Its
schema is written down in torch/cuda/memory.py (torch 2.13).
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.trace.allocator_rules import AllocatorRules
from planner.errors import DataError, FinefitError, NotModelledError
from planner.units import GIB, format_bytes

MAX_FILE_BYTES = 4 * GIB
"""A larger file is refused: its objects would take several times that in memory."""
OBJECT_BYTES_PER_BYTE = 64
"""A pickled frame of a stack takes some 20 bytes and becomes a dict of some 250; with room to spare."""
Event = tuple[str, int, int, int]
"""(action, address, bytes, stream)"""


class _PlainUnpickler(pickle.Unpickler):
    """Containers, text, numbers, truth values and None: nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a snapshot needs no code")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A segment as it was found; `blocks` are those in use: (address, bytes)."""

    address: int
    num_bytes: int
    stream: int
    is_small: bool
    is_expandable: bool
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One device of a snapshot: its segments at the end, what was recorded before, and the settings."""

    device: int
    segments: tuple[Segment, ...]
    events: tuple[Event, ...]
    rules: AllocatorRules


# --- reading


def read_snapshot(path: Path) -> list[Snapshot]:
    """The devices of a snapshot file that have a history.

    Raises DataError where it isn't one, and NotModelledError for CUDA graphs' own pools.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(str(path), f"larger than {format_bytes(MAX_FILE_BYTES)}; record fewer entries")
        data = path.read_bytes()
    except OSError as error:
        raise FinefitError(f"can't read {path}: {error.strerror or error}") from error
    try:
        return _devices(_parse(data))
    except FinefitError:
        raise
    except RecursionError:
        raise DataError(str(path), "not a memory snapshot of torch: nested too deeply") from None
    except Exception as error:
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise DataError(str(path), f"not a memory snapshot of torch: {reason:.160}") from error


def _parse(data: bytes) -> Mapping[str, Any]:
    if data[:1] in (b"{", b"["):
        found = json.loads(data)
    else:
        with _limited_memory(OBJECT_BYTES_PER_BYTE * len(data) + GIB):
            found = _PlainUnpickler(io.BytesIO(data)).load()
    if not isinstance(found, dict) or not isinstance(found.get("segments"), list):
        raise ValueError("it has no list of segments")
    return found


@contextmanager
def _limited_memory(num_bytes: int) -> Iterator[None]:
    """Inside, the process may grow by so much only: a few bytes of a pickle can ask for a table of 64 GiB."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + num_bytes
    if limits[0] != resource.RLIM_INFINITY:
        wanted = min(wanted, limits[0])
    resource.setrlimit(resource.RLIMIT_AS, (wanted, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _devices(data: Mapping[str, Any]) -> list[Snapshot]:
    rules = _rules(data.get("allocator_settings") or {})
    traces = data.get("device_traces") or []
    found = [
        _device(number, trace, data["segments"], rules) for number, trace in enumerate(traces) if len(trace)
    ]
    if not found:
        raise ValueError("no history: call torch.cuda.memory._record_memory_history() before the run")
    return found


def _rules(settings: Mapping[str, Any]) -> AllocatorRules:
    max_split_bytes = _number(settings.get("max_split_size", -1))
    divisions = settings.get("roundup_power2_divisions") or {}
    return AllocatorRules(
        expandable=settings.get("expandable_segments") is True,
        max_split_bytes=max_split_bytes if max_split_bytes > 0 else None,
        power2_divisions={int(mib): _number(parts) for mib, parts in divisions.items() if _number(parts) > 0},
    )


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r:.40} is no whole number")
    return value


def _device(number: int, trace: Sequence[Any], segments: Sequence[Any], rules: AllocatorRules) -> Snapshot:
    mine = [segment for segment in segments if segment.get("device", 0) == number]
    pools = {
        tuple(item.get(key, (0, 0)))
        for key, items in (("segment_pool_id", mine), ("pool_id", trace))
        for item in items
    }
    if pools - {(0, 0)}:
        raise NotModelledError(
            f"device {number} has pools of CUDA graphs: only the default pool can be replayed"
        )
    return Snapshot(
        device=number,
        segments=tuple(_segment(segment) for segment in mine),
        events=tuple(_event(entry) for entry in trace if entry["action"] in REPLAYED),
        rules=rules,
    )


REPLAYED = ("alloc", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap")
"""Actions that change anything: a block is free again when its free is completed, not when it is requested."""


def _event(entry: Mapping[str, Any]) -> Event:
    action = entry["action"]
    return action, _number(entry["addr"]), _number(entry["size"]), _number(entry.get("stream", 0))


def _segment(segment: Mapping[str, Any]) -> Segment:
    address = _number(segment["address"])
    blocks = []
    for block in segment["blocks"]:
        # older versions leave the addresses of the blocks out
        start = _number(block.get("address", address))
        address = start + _number(block["size"])
        if block["state"] != "inactive":
            blocks.append((start, block["size"]))
    return Segment(
        address=_number(segment["address"]),
        num_bytes=_number(segment["total_size"]),
        stream=_number(segment.get("stream", 0)),
        is_small=segment.get("segment_type") == "small",
        is_expandable=segment.get("is_expandable") is True,
        blocks=tuple(blocks),
    )
