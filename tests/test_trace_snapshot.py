"""Memory snapshots: read without running anything, replayed from the state before them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.cli import run
from bench.trace.allocator import Block, CachingAllocator
from bench.trace.allocator_rules import AllocatorRules
from bench.trace.snapshot import read_snapshot
from bench.trace.snapshot_replay import compare_snapshot, segments_before
from planner.errors import DataError, FinefitError, NotModelledError
from planner.units import MIB

BASE = 0x7F00_0000_0000


def entry(action: str, addr: int, size: int, stream: int = 0) -> dict[str, Any]:
    frames = [{"filename": "model.py", "line": 7, "name": "forward"}]
    return {
        "action": action,
        "addr": addr,
        "size": size,
        "stream": stream,
        "time_us": 1,
        "frames": frames,
        "pool_id": (0, 0),
    }


def segment(address: int, total: int, blocks: list[tuple[int, str]], **changes: Any) -> dict[str, Any]:
    found, start = [], address
    for size, state in blocks:
        found.append({"address": start, "size": size, "requested_size": size, "state": state, "frames": []})
        start += size
    return {
        "device": 0,
        "address": address,
        "total_size": total,
        "allocated_size": sum(size for size, state in blocks if state != "inactive"),
        "stream": 0,
        "segment_type": "small" if total == 2 * MIB else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "blocks": found,
        **changes,
    }


def settings_of(**changes: Any) -> dict[str, Any]:
    return {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "max_split_size": -1,
        "garbage_collection_threshold": 0.0,
        "expandable_segments": False,
        "roundup_power2_divisions": {str(2**i): 0 for i in range(16)},
        **changes,
    }


# A 30 MiB tensor lives before the recording; then 12 MiB are allocated and freed, and 11 MiB take their block whole.
SIMPLE: dict[str, Any] = {
    "segments": [
        segment(BASE, 30 * MIB, [(30 * MIB, "active_allocated")]),
        segment(BASE + 64 * MIB, 12 * MIB, [(12 * MIB, "active_allocated")]),
    ],
    "device_traces": [
        [
            entry("segment_alloc", BASE + 64 * MIB, 12 * MIB),
            entry("alloc", BASE + 64 * MIB, 12 * MIB),
            entry("free_requested", BASE + 64 * MIB, 12 * MIB),
            entry("free_completed", BASE + 64 * MIB, 12 * MIB),
            entry("alloc", BASE + 64 * MIB, 11 * MIB),
            {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "frames": []},
        ],
        [],
    ],
    "allocator_settings": settings_of(),
}


def save(folder: Path, data: Any, name: str = "snapshot.pickle") -> Path:
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(data))
    else:
        path.write_bytes(pickle.dumps(data))
    return path


@pytest.mark.parametrize("name", ["snapshot.pickle", "snapshot.json"])
def test_a_snapshot_by_hand_is_replayed_exactly(tmp_path: Path, name: str) -> None:
    (found,) = compare_snapshot(read_snapshot(save(tmp_path, SIMPLE, name)))
    sizes = {key: (f.recorded_bytes, f.replayed_bytes) for key, f in found.figures.items()}
    assert sizes == {
        "peak reserved": (42 * MIB, 42 * MIB),
        "peak allocated": (42 * MIB, 42 * MIB),
        "reserved at the end": (42 * MIB, 42 * MIB),
        "allocated at the end": (42 * MIB, 42 * MIB),
    }
    assert (found.num_requests, found.num_emptied) == (2, 0)


def test_segments_that_were_given_back_were_there_before(tmp_path: Path) -> None:
    # A cached 40 MiB segment is freed under pressure before 50 MiB are mapped; its tensor died in the recording.
    data = {
        "segments": [segment(BASE, 50 * MIB, [(50 * MIB, "active_allocated")])],
        "device_traces": [
            [
                entry("free_requested", BASE + 99 * MIB, 40 * MIB),
                entry("free_completed", BASE + 99 * MIB, 40 * MIB),
                entry("segment_free", BASE + 99 * MIB, 40 * MIB),
                entry("segment_alloc", BASE, 50 * MIB),
                entry("alloc", BASE, 50 * MIB),
            ]
        ],
        "allocator_settings": settings_of(),
    }
    (device,) = read_snapshot(save(tmp_path, data))
    (before,) = segments_before(device)
    assert (before.address, before.blocks) == (BASE + 99 * MIB, ((BASE + 99 * MIB, 40 * MIB),))
    (found,) = compare_snapshot([device])
    assert found.figures["peak reserved"].replayed_bytes == 50 * MIB
    assert found.figures["peak reserved"].error == 0
    assert found.num_emptied == 1


def test_a_replay_that_differs_says_by_how_much(tmp_path: Path) -> None:
    # The recorded run mapped 20 MiB for 12: the rules would have mapped 12.
    data = json.loads(json.dumps(SIMPLE))
    data["device_traces"][0][0]["size"] = 20 * MIB
    (found,) = compare_snapshot(read_snapshot(save(tmp_path, data)))
    assert found.figures["peak reserved"].error == pytest.approx(42 / 50 - 1)


def test_the_settings_are_the_recorded_ones(tmp_path: Path) -> None:
    changed = settings_of(
        max_split_size=64 * MIB,
        expandable_segments=True,
        roundup_power2_divisions={"1": 4, "2": 0},
    )
    (device,) = read_snapshot(save(tmp_path, {**SIMPLE, "allocator_settings": changed}))
    assert device.rules == AllocatorRules(expandable=True, max_split_bytes=64 * MIB, power2_divisions={1: 4})


class Recorder:
    """Runs an allocator and writes down what torch would."""

    def __init__(self, expandable: bool) -> None:
        self.trace: list[dict[str, Any]] = []
        self.next = BASE
        self.allocator = CachingAllocator(AllocatorRules(expandable=expandable), find_address=self.address)

    def address(self, num_bytes: int) -> int:
        self.trace.append(entry("segment_alloc", self.next, num_bytes))
        self.next += num_bytes
        return self.next - num_bytes

    def allocate(self, key: int, num_bytes: int, stream: int) -> None:
        before = {b.address: b.num_bytes for b in self.allocator.blocks()}
        reserved = self.allocator.reserved_bytes
        first = len(self.trace)
        self.allocator.allocate(key, num_bytes, stream)
        mapped = self.allocator.reserved_bytes - reserved
        if mapped and len(self.trace) == first:
            ends = [a + n for a, n in before.items()]
            block = self.allocator._used[key]
            inside = [end for end in ends if block.address < end <= block.address + block.num_bytes]
            self.trace.append(entry("segment_map", max(inside, default=block.address), mapped, stream))
        for made in self.trace[first:]:
            made["stream"] = stream
        self.trace.append(entry("alloc", self.allocator._used[key].address, num_bytes, stream))

    def free(self, key: int, num_bytes: int) -> None:
        block = self.allocator._used[key]
        for action in ("free_requested", "free_completed"):
            self.trace.append(entry(action, block.address, num_bytes, block.pool.stream))
        self.allocator.free(key)

    def snapshot(self, num_forgotten: int) -> dict[str, Any]:
        heads = [b for b in self.allocator.blocks() if b.before is None]
        rules = self.allocator.rules
        return {
            "segments": [self._segment(head) for head in heads],
            "device_traces": [self.trace[num_forgotten:]],
            "allocator_settings": settings_of(expandable_segments=rules.expandable),
        }

    def _segment(self, head: Block) -> dict[str, Any]:
        blocks, block = [], head
        while block is not None and block.is_mapped:
            blocks.append((block.num_bytes, "inactive" if block.is_free else "active_allocated"))
            block = block.after  # type: ignore[assignment]
        return segment(
            head.address,
            sum(size for size, _ in blocks),
            blocks,
            stream=head.pool.stream,
            segment_type="small" if head.pool.is_small else "large",
            is_expandable=head.base is not None,
        )


sizes = st.one_of(st.integers(1, 3 * MIB), st.integers(1, 64 * MIB))
steps = st.lists(st.tuples(sizes, st.booleans(), st.integers(0, 1)), min_size=1, max_size=30)


@given(steps, st.booleans(), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_a_recording_from_any_moment_on_is_replayed_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    run_: list[tuple[int, bool, int]],
    expandable: bool,
    share: float,
) -> None:
    recorder = Recorder(expandable)
    alive: list[tuple[int, int]] = []
    for key, (num_bytes, frees_one, stream) in enumerate(run_):
        recorder.allocate(key, num_bytes, stream)
        alive.append((key, num_bytes))
        if frees_one:
            recorder.free(*alive.pop(len(alive) // 2))
    bounds = [
        i for i, e in enumerate(recorder.trace) if i and e["action"] in ("segment_alloc", "free_requested")
    ]
    forgotten = bounds[int(share * (len(bounds) - 1))] if bounds else 0
    path = save(tmp_path_factory.mktemp("s"), recorder.snapshot(forgotten))
    (found,) = compare_snapshot(read_snapshot(path))
    for name in ("peak reserved", "reserved at the end", "allocated at the end"):
        assert found.figures[name].error == 0, name


# --- files that are none


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("hacked"),))


def changed(**changes: Any) -> bytes:
    return pickle.dumps({**SIMPLE, **changes})


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello\n",
    "code": pickle.dumps({"segments": [Evil()]}),
    "cut off": pickle.dumps(SIMPLE)[:200],
    "no dict": pickle.dumps([1, 2]),
    "no segments": pickle.dumps({"device_traces": [[]]}),
    "no history": changed(device_traces=[[], []]),
    "no traces": changed(device_traces=None),
    "an entry without a size": changed(device_traces=[[{"action": "alloc", "addr": 1}]]),
    "an entry that is no object": changed(device_traces=[[3]]),
    "a size in words": changed(device_traces=[[entry("alloc", 1, "big")]]),  # type: ignore[arg-type]
    "settings that are a list": changed(allocator_settings=[1]),
    "broken json": b'{"segments": [',
    "deep json": b'{"segments": ' + b"[" * 100_000,
    "a large number": b'{"segments": [' + b"9" * 5000 + b"]}",
    # LONG_BINPUT asks for a memo of four thousand million entries
    "a memo of 64 GiB": b"\x80\x04N" + b"r" + (2**32 - 1).to_bytes(4, "little") + b".",
    "a persistent id": b"\x80\x04\x8c\x01aQ.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_hostile_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "s.pickle"
    path.write_bytes(BROKEN[name])
    with pytest.raises(DataError):
        read_snapshot(path)
    assert run(["trace", "--snapshot", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "unexpected" not in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["s.pickle"]


def test_pools_of_cuda_graphs_are_not_guessed(tmp_path: Path) -> None:
    data = {**SIMPLE, "segments": [segment(BASE, 2 * MIB, [], segment_pool_id=(0, 1))]}
    with pytest.raises(NotModelledError):
        read_snapshot(save(tmp_path, data))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FinefitError, match=r"none\.pickle"):
        read_snapshot(tmp_path / "none.pickle")


def test_the_command_prints_recorded_beside_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path, SIMPLE)
    assert run(["trace", "--snapshot", str(path), "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device["figures"]["peak reserved"] == {
        "recorded_bytes": 42 * MIB,
        "replayed_bytes": 42 * MIB,
        "error": 0.0,
    }
    assert run(["trace", "--snapshot", str(path)]) == 0
    assert "peak reserved" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["llama-3.1-8b", "--snapshot", "x.pickle"],
        ["--snapshot", "x.pickle", "--method", "full"],
        ["--snapshot", "x.pickle", "--gpu", "rtx-4090"],
        ["--cases", "x.jsonl", "--plot", "x.svg"],
        ["llama-3.1-8b", "--gpu", "rtx-4090", "--plot", "x.gif"],
        pytest.param(["llama-3.1-8b"], marks=pytest.mark.train),
    ],
    ids=" ".join,
)
def test_words_that_contradict_each_other_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["trace", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
