"""The computer around the accelerator: processor, memory and limits, without torch and without psutil on Linux."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planner.errors import MissingExtraError

ROOT = Path("/")
KIB = 1024

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "sve", "bf16", "i8mm")
"""Instruction sets that decide how fast training on the CPU is, by their names in /proc/cpuinfo."""
BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Those that multiply bfloat16 in hardware (x86, x86, Arm)."""

_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd", "0x41": "arm", "0xc0": "ampere", "0x61": "apple"}
"""/proc/cpuinfo's vendor_id (x86) or CPU implementer (Arm)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cpu:
    """The processor. `num_cpus` counts the logical processors that this process may use, limits honoured."""

    model: str
    vendor: str
    architecture: str
    features: tuple[str, ...]
    num_cpus: int
    num_logical_cpus: int | None

    @property
    def has_bf16(self) -> bool:
        """Whether bfloat16 is multiplied in hardware."""
        return not BF16_FEATURES.isdisjoint(self.features)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """RAM in bytes. `limit_bytes` is the control group's (container's) limit, None where there is none."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None = None

    @property
    def usable_total_bytes(self) -> int:
        """The total, or the limit where that is lower."""
        return self.total_bytes if self.limit_bytes is None else min(self.total_bytes, self.limit_bytes)


def read_cpu(root: Path = ROOT) -> Cpu:
    """The processor by /proc/cpuinfo, elsewhere by what Python's platform module knows."""
    facts = _key_values(root / "proc/cpuinfo")
    vendor = facts.get("vendor_id") or facts.get("CPU implementer") or ""
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return Cpu(
        model=facts.get("model name") or platform.processor() or "unknown",
        vendor=_VENDORS.get(vendor, vendor.lower() or "unknown"),
        architecture=platform.machine() or "unknown",
        features=tuple(name for name in CPU_FEATURES if name in flags),
        num_cpus=count_cpus(root),
        num_logical_cpus=os.cpu_count(),
    )


def count_cpus(root: Path = ROOT) -> int:
    """Logical processors that this process may use: affinity, and the control group's quota rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for quota in map(_cpu_quota, _groups(root, "cpu")) if quota]
    return max(1, min([affinity, *quotas]))


def read_memory(root: Path = ROOT) -> HostMemory:
    """RAM that exists and that is available now, both within the control group's limit.

    Raises MissingExtraError where neither /proc nor psutil can say it.
    """
    facts = _key_values(root / "proc/meminfo")
    if "MemAvailable" not in facts:
        return _memory_by_psutil()
    total, available = (int(facts[key].split()[0]) * KIB for key in ("MemTotal", "MemAvailable"))
    limits = [limit for limit in map(_memory_limit, _groups(root, "memory")) if limit and limit[0] < total]
    for _, left in limits:
        available = min(available, left)
    limit = min((limit for limit, _ in limits), default=None)
    return HostMemory(total_bytes=total, available_bytes=available, limit_bytes=limit)


def peak_rss_bytes(pid: int | None = None, root: Path = ROOT) -> int | None:
    """The highest resident set of a process so far (this one by default); None once it is gone.

    Not `ru_maxrss`, which a child inherits from the parent that started it.
    """
    name = "self" if pid is None else str(pid)
    text = _key_values(root / "proc" / name / "status").get("VmHWM")
    if text is not None:
        return int(text.split()[0]) * KIB
    return None if sys.platform == "linux" else _rss_by_psutil(pid)


def rss_bytes(pid: int, root: Path = ROOT) -> tuple[int | None, int | None]:
    """The resident set of a process now and at its highest so far, in one look; None once it is gone."""
    facts = _key_values(root / "proc" / str(pid) / "status")
    if "VmHWM" in facts and "VmRSS" in facts:
        now, peak = (int(facts[key].split()[0]) * KIB for key in ("VmRSS", "VmHWM"))
        return now, peak
    peak_elsewhere = None if sys.platform == "linux" else _rss_by_psutil(pid)
    return peak_elsewhere, peak_elsewhere


def reset_peak_rss() -> bool:
    """Start `peak_rss_bytes` of this process anew; False where the system can't."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def count_oom_kills(root: Path = ROOT) -> int:
    """Processes that the kernel ended since the start because memory ran out; 0 where it doesn't count them."""
    for line in _lines(root / "proc/vmstat"):
        key, _, value = line.partition(" ")
        if key == "oom_kill" and value.isdigit():
            return int(value)
    return 0


def _key_values(path: Path) -> dict[str, str]:
    """The first value of each `key : value` line; empty where the file can't be read."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process' control group and of the groups around it, for version 1 and 2.

    Inside a container the path in /proc/self/cgroup may be the host's; the mount's own root is then its group.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount = mounts
        elif controller in controllers.split(","):
            mount = mounts / controller
        else:
            continue
        group = mount / path.lstrip("/")
        while group != mount:
            yield group
            group = group.parent
        yield mount


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _memory_limit(group: Path) -> tuple[int, int] | None:
    """(limit, bytes left) of one group: what is used without the page cache that the kernel would give back."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = _number(group / limit_name), _number(group / used_name)
        if limit is not None and used is not None:
            return limit, max(0, limit - max(0, used - _reclaimable(group)))
    return None


def _reclaimable(group: Path) -> int:
    """Bytes of idle page cache; version 1 gives the whole subtree's under its own name."""
    facts = dict(line.split(" ", 1) for line in _lines(group / "memory.stat") if " " in line)
    value = facts.get("total_inactive_file") or facts.get("inactive_file") or ""
    return int(value) if value.isdigit() else 0


def _cpu_quota(group: Path) -> int | None:
    """Whole processors that the group may use, rounded up; None without a quota."""
    words = (_lines(group / "cpu.max") or [""])[0].split()
    if len(words) != 2:
        words = [*_lines(group / "cpu.cfs_quota_us")[:1], *_lines(group / "cpu.cfs_period_us")[:1]]
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None
    return max(1, -(-int(words[0]) // int(words[1])))


def _memory_by_psutil() -> HostMemory:
    try:
        import psutil
    except ImportError as error:
        raise MissingExtraError("hw", "train", "psutil") from error
    memory = psutil.virtual_memory()
    return HostMemory(total_bytes=memory.total, available_bytes=memory.available)


def _rss_by_psutil(pid: int | None) -> int | None:
    try:
        import psutil
    except ImportError as error:
        raise MissingExtraError("bench", "train", "psutil") from error
    try:
        info = psutil.Process(pid).memory_info()
    except psutil.Error:
        return None
    return int(getattr(info, "peak_wset", info.rss))
