"""What a record says of the computer and the software: enough to compare runs, nothing that names a person."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

import planner
from bench.hardware import stack_versions
from bench.host import ROOT, read_cpu, read_memory

_MACHINE_ID = "etc/machine-id"


def describe_environment(root: Path = ROOT) -> dict[str, Any]:
    """Versions, processor, memory and system, without importing the training stack.

    `machine_id` is a hash that only tells equal machines from different ones (None where the system has no id).
    """
    cpu, memory = read_cpu(root), read_memory(root)
    return {
        "finefit": planner.__version__,
        "commit": commit(),
        "versions": stack_versions(),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "cpu_model": cpu.model,
        "cpu_features": list(cpu.features),
        "num_cpus": cpu.num_cpus,
        "ram_bytes": memory.usable_total_bytes,
        "machine_id": machine_id(root),
    }


def commit(package: Path = Path(planner.__file__)) -> str | None:
    """The source's git commit ("-dirty" where files differ); None for an installed package."""
    source = next((folder for folder in package.parents if (folder / ".git").exists()), None)
    if source is None or "site-packages" in package.parts:
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine_id(root: Path = ROOT) -> str | None:
    """A hash of the system's id that can't be turned back and is used nowhere else (as systemd's manual asks)."""
    try:
        own = (root / _MACHINE_ID).read_bytes().strip()
    except OSError:
        return None
    return hashlib.sha256(b"finefit machine " + own).hexdigest()[:12] if own else None
