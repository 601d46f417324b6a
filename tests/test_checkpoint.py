"""Checkpoints are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.checkpoint import (
    MANIFEST,
    STATE,
    TENSORS,
    WEIGHTS,
    TensorStore,
    check_disk,
    flatten,
    load_weights,
    newest_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    tensor_bytes,
    unflatten,
)
from planner.errors import FinefitError

pytestmark = pytest.mark.train

WEIGHT = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(2, dtype=torch.bfloat16)}


def state_of(step: int) -> dict[str, Any]:
    return {
        "run": {"step": step, "evaluations": [{"loss": 1.5}], "nothing": None},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3, 4, dtype=torch.bfloat16)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
    }


def save(root: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(root, step, WEIGHT, state_of(step))


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
tensors = st.lists(st.floats(-1e3, 1e3), max_size=3).map(torch.tensor)
trees = st.recursive(
    leaves | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.sampled_from(["$tensor", "$items"]), inner)
    ),
    max_leaves=12,
)


@given(trees)
def test_any_tree_comes_back_through_json(tree: Any) -> None:
    store = TensorStore()
    plain = json.loads(json.dumps(flatten(tree, store)))
    assert_same(unflatten(plain, store.tensors), tree)


def test_only_plain_values_are_held() -> None:
    with pytest.raises(TypeError, match="SimpleNamespace"):
        flatten({"a": SimpleNamespace()}, TensorStore())


def test_a_shared_tensor_is_stored_once() -> None:
    code = torch.rand(256)
    store = TensorStore()
    flatten([{"qmap": code}, {"qmap": code}, code.clone()], store)
    assert len(store.tensors) == 2


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 7)
    checkpoint, notes = newest_checkpoint(tmp_path)
    assert notes == []
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.path.name) == (7, "step-000007")
    assert_same(dict(sorted(checkpoint.weights.items())), WEIGHT)
    assert_same(checkpoint.state, state_of(7))


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 10, 1_000_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-1000000"]
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1_000_000


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-000003" / MANIFEST).unlink()
    save(tmp_path, 3)
    assert newest_checkpoint(tmp_path)[1] == []


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "flipped": flip_a_byte,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("name", [WEIGHTS, TENSORS, STATE, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_skipped_and_named(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step-000002" / name
    DAMAGES[damage](path)
    checkpoint, notes = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(notes) == 1
    assert "step-000002 is torn" in notes[0]


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """Whatever the byte, in whatever file: the content is as it was saved, or the checkpoint before is used."""
    save(tmp_path, 1, 2)
    files = sorted((tmp_path / "step-000002").iterdir())
    draw = random.Random(11)
    used = set()
    for _ in range(100):
        path = draw.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        checkpoint, notes = newest_checkpoint(tmp_path)
        assert checkpoint is not None
        assert bool(notes) == (checkpoint.step == 1)
        assert_same(checkpoint.state, state_of(checkpoint.step))
        used.add((path.name, checkpoint.step))
        path.write_bytes(whole)
    assert {(path.name, 1) for path in files} <= used
    assert {name for name, step in used if step == 2} <= {MANIFEST}, (
        "only blanks of the manifest don't matter"
    )


def test_none_is_whole(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])
    save(tmp_path, 1)
    (tmp_path / "step-000001" / WEIGHTS).unlink()
    checkpoint, notes = newest_checkpoint(tmp_path)
    assert checkpoint is None
    assert len(notes) == 1


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-mine").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    save(tmp_path, 1, 2, 3)
    assert (tmp_path / "step-mine").is_dir()
    assert (tmp_path / "notes.txt").exists()


def test_a_failed_write_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bench.checkpoint.save_file", full_disk)
    with pytest.raises(FinefitError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_disk_space_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    check_disk(tmp_path, 1000)
    with pytest.raises(FinefitError, match="free"):
        check_disk(tmp_path, 1001)


def test_tensor_bytes_is_what_the_files_take(tmp_path: Path) -> None:
    save(tmp_path, 1)
    on_disk = sum((tmp_path / "step-000001" / name).stat().st_size for name in (WEIGHTS, TENSORS))
    headers = 1000
    assert tensor_bytes(WEIGHT) + tensor_bytes(state_of(1)) <= on_disk
    assert on_disk <= tensor_bytes(WEIGHT) + tensor_bytes(state_of(1)) + headers


def test_random_generators_come_back() -> None:
    before = random_state()
    first = torch.rand(3)
    set_random_state(before)
    assert torch.equal(torch.rand(3), first)


def test_weights_of_another_model_are_refused() -> None:
    mine = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    load_weights(mine, {"a": torch.ones(2, 3), "b": torch.ones(4)})
    assert all(bool((p == 1).all()) for p in mine.values())
    for other in ({"a": torch.ones(2, 3)}, {"a": torch.ones(3, 2), "b": torch.ones(4)}):
        with pytest.raises(FinefitError, match="another model"):
            load_weights(mine, other)


ENDLESS_SAVER = """
import sys, torch
from pathlib import Path
from bench.checkpoint import newest_checkpoint, save_checkpoint
root = Path(sys.argv[1])
found, notes = newest_checkpoint(root)
step = found.step if found else 0
if found is not None:
    assert int(found.weights["w"][0]) == step and found.state["step"] == step
print("ready", step, len(notes), flush=True)
while True:
    step += 1
    save_checkpoint(root, step, {"w": torch.full((200_000,), float(step))}, {"step": step, "t": torch.ones(1000)})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_of_saving_loses_no_whole_checkpoint(tmp_path: Path) -> None:
    """Each life saves for ever and is killed; the next must find at least what was reported as saved."""
    moments = random.Random(5)
    reported = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        _, found, num_torn = process.stdout.readline().split()
        assert int(found) >= reported
        assert int(num_torn) == 0, "a rename is whole or has not happened"
        time.sleep(moments.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        saved = process.stdout.read().splitlines()
        reported = int(saved[-1]) if saved else reported
        process.wait()
    assert reported > 0
