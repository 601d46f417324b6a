"""Crash-safe checkpoints: whole or not there, never executed when read.

`checkpoints/step-000123/` holds `weights.safetensors` (the trained parameters), `state.safetensors` and `state.json`
(optimizer, random generators, the run's position) and `manifest.json` (sizes and SHA-256 of the others). The folder
is written aside, each file fsynced, the manifest last, then renamed. Of several ranks the first writes there, each
other one in a folder `rank-0001/` … of the same checkpoint; the manifest names all files. A folder whose manifest
doesn't hold is skipped, saying so, and the one before is used; that is why at least two are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bench.world import ALONE, World
from planner.errors import FinefitError
from planner.units import format_bytes

MANIFEST = "manifest.json"
WEIGHTS, TENSORS, STATE = "weights.safetensors", "state.safetensors", "state.json"
KEEP = 2
"""Checkpoints that stay: the newest, and one to fall back to should it turn out to be torn."""

_PREFIX = "step-"
_ASIDE, _DOOMED = ".writing-", ".deleting-"
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Checkpoint:
    """What a whole checkpoint holds, on the CPU."""

    path: Path
    step: int
    weights: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def save_checkpoint(
    root: Path,
    step: int,
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    keep: int = KEEP,
    world: World = ALONE,
    spared_step: int | None = None,
) -> Path:
    """Write `root/step-…`, then delete all but the newest `keep` and that of `spared_step`.

    Raises FinefitError; earlier ones stay whole.

    Later ones go too: they are torn, or of a course that was given up, and would otherwise count as the newest.
    `state` may nest dicts, lists and tuples of tensors, numbers, strings and None. Each rank gives what it saves; when
    one fails, none has saved.
    """
    target = root / f"{_PREFIX}{step:06d}"
    aside = root / f"{_ASIDE}{target.name}"

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        aside.mkdir()

    def commit() -> None:
        _write_manifest(aside)
        if target.exists():
            _remove(target)
        aside.rename(target)
        sync(root, root.parent)
        for old in [p for p in _folders(root) if _step_of(p) > step] + _folders(root, step)[keep:]:
            if _step_of(old) != spared_step:
                _remove(old)

    def write() -> None:
        _write_files(_own_folder(aside, world.rank), weights, state)

    for part, is_everyones in ((begin, False), (write, True), (commit, False)):
        error = _failure(part) if world.is_first or is_everyones else None
        why = world.first_word(None if error is None else str(error))
        if why is not None:
            shutil.rmtree(aside, ignore_errors=True)
            raise FinefitError(f"can't write checkpoint {target}: {why}") from error
    return target


def _failure(part: Callable[[], None]) -> Exception | None:
    try:
        part()
    except (OSError, SafetensorError) as error:
        return error
    return None


def _own_folder(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}" if rank else folder


def newest_checkpoint(root: Path, world: World = ALONE) -> tuple[Checkpoint | None, list[str]]:
    """This rank's part of the newest whole checkpoint (None: there is none), and a line for each newer one that is torn.

    The first rank alone reads all files to see what is whole, and alone gets the lines. Raises FinefitError where
    another number of ranks wrote it.
    """
    step, notes = _newest_step(root) if world.is_first else (0, [])
    step = round(world.total(step)[0])
    return (_read(root / f"{_PREFIX}{step:06d}", world) if step else None), notes


def _newest_step(root: Path) -> tuple[int, list[str]]:
    """0: there is none."""
    notes: list[str] = []
    for folder in _folders(root):
        fault = _fault(folder)
        if fault is None:
            return _step_of(folder), notes
        notes.append(f"checkpoint {folder.name} is torn ({fault}) and is skipped")
    return 0, notes


def read_checkpoint(root: Path, step: int, world: World = ALONE) -> Checkpoint | None:
    """This rank's part of the checkpoint of a step, None where it isn't there whole."""
    folder = root / f"{_PREFIX}{step:06d}"
    is_torn = world.is_first and _fault(folder) is not None
    return None if world.any(is_torn) else _read(folder, world)


def load_weights(parameters: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy saved weights into a model's trained parameters. Raises FinefitError when they don't match."""
    wrong = sorted(set(parameters) ^ set(saved)) or [
        name for name, p in parameters.items() if p.shape != saved[name].shape
    ]
    if wrong:
        raise FinefitError(
            f"the checkpoint belongs to another model: {wrong[0]} differs ({len(wrong)} in all)"
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(saved[name])


def random_state() -> dict[str, Any]:
    """The states of torch's generators, as tensors."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put torch's generators back; CUDA's only where as many devices are there as were saved."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples: what a checkpoint of it takes on disk."""
    if isinstance(tree, torch.Tensor):
        return int(tree.numel() * tree.element_size())
    if isinstance(tree, Mapping):
        return sum(map(tensor_bytes, tree.values()))
    return sum(map(tensor_bytes, tree)) if isinstance(tree, list | tuple) else 0


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise FinefitError when the file system of `folder` has fewer free bytes than are needed."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise FinefitError(
            f"{folder}: the disk has {format_bytes(free_bytes)} free and the checkpoints need "
            f"{format_bytes(needed_bytes)}; free some space or choose another --out"
        )


class TensorStore:
    """Tensors taken out of a tree, by key; one that several owners share (bitsandbytes' code book) only once."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._keys: dict[tuple[Any, ...], str] = {}

    def add(self, tensor: torch.Tensor) -> str:
        """Keep the tensor; its key."""
        plain = tensor.detach().contiguous()
        identity = (plain.data_ptr() or len(self.tensors), plain.shape, plain.dtype, plain.device)
        key = self._keys.setdefault(identity, str(len(self.tensors)))
        self.tensors[key] = plain
        return key


def flatten(value: Any, store: TensorStore) -> Any:
    """`value` as JSON, with its tensors moved to `store`; `unflatten` gives it back. Raises TypeError."""
    if isinstance(value, torch.Tensor):
        return {_TENSOR: store.add(value)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: flatten(item, store) for key, item in value.items()}
        return {_ITEMS: [[key, flatten(item, store)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [flatten(item, store) for item in value]}
    if isinstance(value, list):
        return [flatten(item, store) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint can't hold a {type(value).__name__}")


def unflatten(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `flatten` was given."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(unflatten(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {key: unflatten(item, tensors) for key, item in value[_ITEMS]}
    return {key: unflatten(item, tensors) for key, item in value.items()}


def _write_files(folder: Path, weights: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    store = TensorStore()
    plain = flatten(state, store)
    save_file({name: t.detach().contiguous() for name, t in weights.items()}, folder / WEIGHTS)
    save_file(store.tensors, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(plain), encoding="utf-8")
    sync(*(folder / name for name in (WEIGHTS, TENSORS, STATE)), folder)


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {path.relative_to(folder).as_posix(): _entry(path) for path in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    sync(manifest, folder)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, None when it is whole."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name in {WEIGHTS: 0, TENSORS: 0, STATE: 0, **entries}:
            if (folder / name).stat().st_size != entries[name]["size"]:
                return f"{name} has another size than its manifest says"
            if _entry(folder / name) != entries[name]:
                return f"{name} has another checksum than its manifest says"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"unreadable: {type(error).__name__}"
    return None


def _read(folder: Path, world: World) -> Checkpoint:
    own = _own_folder(folder, world.rank)
    num_ranks = 1 + len(list(folder.glob("rank-*")))
    if num_ranks != world.size:
        raise FinefitError(
            f"{folder} was written by {num_ranks} processes, and this run has {world.size}; choose another --out"
        )
    parts = [folder, own] if world.is_replica else [own]
    state: dict[str, Any] = {}
    for part in parts:
        plain = json.loads((part / STATE).read_text(encoding="utf-8"))
        state |= unflatten(plain, load_file(part / TENSORS))
    return Checkpoint(path=folder, step=_step_of(folder), weights=load_file(parts[0] / WEIGHTS), state=state)


def saved_steps(root: Path) -> list[int]:
    """The steps of which there is a checkpoint, whole or not, newest first."""
    return [_step_of(folder) for folder in _folders(root)]


def _folders(root: Path, last_step: int | None = None) -> list[Path]:
    """Checkpoint folders up to `last_step`, newest first."""
    found = [p for p in root.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdecimal() and p.is_dir()]
    wanted = [p for p in found if last_step is None or _step_of(p) <= last_step]
    return sorted(wanted, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a crash half-way leaves nothing that looks like one."""
    doomed = folder.with_name(f"{_DOOMED}{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(root: Path) -> None:
    """Delete what a process left behind that was killed while it saved. No other may be saving there."""
    for leftover in (*root.glob(f"{_ASIDE}*"), *root.glob(f"{_DOOMED}*")):
        shutil.rmtree(leftover)


def sync(*paths: Path) -> None:
    """fsync files and folders."""
    for path in _existing(paths):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _existing(paths: Iterable[Path]) -> Iterable[Path]:
    """Windows can't open folders for this, and its renames need none."""
    return [path for path in paths if os.name != "nt" or path.is_file()]
