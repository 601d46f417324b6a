"""The hardware report: everything that decides what can be trained on this machine, to read and to paste.

It holds no user name, host name or path. A part that can't be read is a line in the report, never a failure.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cards import card_profile, usable_bytes
from bench.host import ROOT, read_cpu, read_memory
from bench.nvml import Card, CardProcess, Cards, Nvml, read_cards
from bench.nvml_driver import Pynvml
from planner.errors import FinefitError
from planner.specs import GpuProfile
from planner.units import GIB, format_bytes

SCHEMA_VERSION = 1
STACK = [
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "datasets",
    "trl",
    "deepspeed",
    "flash-attn",
    "liger-kernel",
    "triton",
    "xformers",
    "unsloth",
    "numpy",
]
"""Packages whose versions decide what works."""

PROBE_TIMEOUT_S = 120.0
_PROBE = """
import json, torch
flags = getattr(torch._C, "_cuda_getArchFlags", lambda: "")() or ""
print(json.dumps({"cuda": torch.version.cuda, "hip": torch.version.hip, "arch_list": flags.split(),
                  "sees_gpu": torch.cuda.is_available(), "num_threads": torch.get_num_threads()}))
"""

LOW_DISK_BYTES = 20 * GIB
"""A 7-billion-parameter model's weights in 16 bits and one checkpoint of its adapters need about this much."""


def hardware_report(
    nvml: Nvml | None = None,
    *,
    root: Path = ROOT,
    probe: Callable[[], Mapping[str, Any]] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The report as plain JSON values: sizes in bytes, temperatures in °C, power in W, clocks in Hz.

    `progress` gets a line before anything slow; `probe` asks torch for its build (a child process, seconds).
    """
    cards = read_cards(nvml or Pynvml())
    progress("asking torch for its build (a few seconds) …")
    report = {
        "schema_version": SCHEMA_VERSION,
        "gpu_driver": _driver(cards),
        "gpus": [_card(card) for card in cards.cards],
        "cpu": asdict(read_cpu(root)),
        "memory": _memory(root),
        "disk": [_disk("this folder", Path.cwd()), _disk("cache", _cache_folder())],
        "torch": dict((probe or probe_torch)()),
        "versions": stack_versions(),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
    }
    return {**report, "warnings": _warnings(report)}


def stack_versions(names: Sequence[str] = STACK) -> dict[str, str]:
    """Versions of the installed packages, read without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def probe_torch(timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, Any]:
    """torch's CUDA version, architectures and threads, asked in a child process; `error` in one line if it fails."""
    if importlib.util.find_spec("torch") is None:
        return {"error": "not installed"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch took longer than {timeout_s:.0f} s"}
    except (OSError, ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"error": f"can't be imported: {last[:200]}"}
    return answer


def runs_on(arch_list: Sequence[str], capability: Sequence[int]) -> bool:
    """Whether a build of torch for `arch_list` has code for a card (CUDA's compatibility rules).

    Machine code (sm_XY) runs on its own major version from minor Y up, with the suffix "a" on that card only and
    with "f" within its family; intermediate code (compute_XY) is compiled for anything newer.

    >>> runs_on(["sm_80", "sm_90a"], (8, 9)), runs_on(["sm_80", "sm_90a"], (12, 0))
    (True, False)
    """
    major, minor = capability
    for entry in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", entry)
        if match is None:
            continue
        kind, built = match[1], (int(match[2]), int(match[3]))
        if match[4] == "a":
            is_match = built == (major, minor)
        elif kind == "compute" and not match[4]:
            is_match = built <= (major, minor)
        else:
            is_match = built[0] == major and built[1] <= minor
        if is_match:
            return True
    return False


def _driver(cards: Cards) -> dict[str, Any]:
    return {
        "missing": cards.missing,
        "version": cards.driver_version,
        "cuda": ".".join(map(str, cards.cuda_version)) if cards.cuda_version else None,
        "problems": list(cards.problems),
    }


def _card(card: Card) -> dict[str, Any]:
    """One card; its unique id stays out, since it identifies the machine."""
    memory, profile = card.memory, _profile(card)
    return {
        "index": card.index,
        "name": card.name,
        "profile": profile.name if profile else None,
        "shares_host_memory": profile.unified_memory if profile else None,
        "compute_capability": list(card.compute_capability) if card.compute_capability else None,
        "total_bytes": memory.total_bytes if memory else None,
        "usable_bytes": usable_bytes(memory) if memory else None,
        "free_bytes": memory.free_bytes if memory else None,
        "is_ecc_on": card.is_ecc_on,
        "is_lost": card.is_lost,
        "mig": None
        if card.mig is None
        else [{"name": i.name, "memory": asdict(i.memory) if i.memory else None} for i in card.mig],
        "processes": None if card.processes is None else [_process(p) for p in card.processes],
        "load": asdict(card.load),
    }


def _profile(card: Card) -> GpuProfile | None:
    try:
        return card_profile(card) if card.name else None
    except FinefitError:
        return None


def _process(process: CardProcess) -> dict[str, Any]:
    """Who uses a card: the program's name and whether it is this user's, never the user's name."""
    program, owner = None, None
    try:
        import psutil

        found = psutil.Process(process.pid)
        program = found.name()
        owner = "you" if found.username() == psutil.Process().username() else "another user"
    except ImportError:
        owner = None
    except (psutil.Error, KeyError):
        owner = "another user or container"
    return {"pid": process.pid, "program": program, "owner": owner, "used_bytes": process.used_bytes}


def _memory(root: Path) -> dict[str, Any]:
    try:
        return asdict(read_memory(root))
    except FinefitError as error:
        return {"error": str(error)}


def _disk(what: str, folder: Path) -> dict[str, Any]:
    """Free bytes of the file system that holds `folder`, or will once it exists."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return {"what": what, "error": error.strerror or str(error)}
    return {"what": what, "free_bytes": usage.free, "total_bytes": usage.total}


def _cache_folder() -> Path:
    from planner.files import user_cache

    return user_cache()


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """What will go wrong on this machine, each in one line with what to do."""
    found = list(report["gpu_driver"]["problems"])
    torch, alive = report["torch"], [gpu for gpu in report["gpus"] if not gpu["is_lost"]]
    if torch.get("error") and torch["error"] != "not installed":
        found.append(f"torch {torch['error']}")
    elif alive and "arch_list" in torch and not (torch["cuda"] or torch["hip"]):
        found.append("this torch is a CPU build: reinstall it from the CUDA wheel index to use the GPU")
    elif alive and torch.get("arch_list"):
        found += [_no_code(gpu, torch) for gpu in alive if _lacks_code(gpu, torch["arch_list"])]
    for gpu in alive:
        found += _card_warnings(gpu)
    for disk in report["disk"]:
        if disk.get("free_bytes", LOW_DISK_BYTES) < LOW_DISK_BYTES:
            found.append(f"disk of {disk['what']}: only {format_bytes(disk['free_bytes'])} free")
    return found


def _lacks_code(gpu: Mapping[str, Any], arch_list: Sequence[str]) -> bool:
    return bool(gpu["compute_capability"]) and not runs_on(arch_list, gpu["compute_capability"])


def _no_code(gpu: Mapping[str, Any], torch: Mapping[str, Any]) -> str:
    architecture = "sm_" + "".join(map(str, gpu["compute_capability"]))
    return (
        f"GPU {gpu['index']}: this torch (CUDA {torch['cuda']}) has no code for {architecture}, only for "
        f"{', '.join(torch['arch_list'])}: install a build whose list has it"
    )


def _card_warnings(gpu: Mapping[str, Any]) -> list[str]:
    found = []
    total, free = gpu["usable_bytes"] or gpu["total_bytes"], gpu["free_bytes"]
    if total and free is not None and free < 0.9 * total:
        found.append(f"GPU {gpu['index']}: {format_bytes(total - free)} of {format_bytes(total)} are in use")
    if gpu["load"]["throttling"]:
        found.append(f"GPU {gpu['index']}: slowed down by: {', '.join(gpu['load']['throttling'])}")
    if gpu["mig"] == []:
        found.append(f"GPU {gpu['index']}: in MIG mode without an instance: no program can use it")
    return found
