"""The hardware report as plain text to paste into an issue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.units import format_bytes

_LABEL_WIDTH = 9


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `hardware_report` as lines of at most about 100 characters."""
    lines = [
        *_gpu_lines(report),
        _line("CPU", _cpu(report["cpu"])),
        _line("RAM", _memory(report["memory"])),
        *(_line("disk", _disk(disk)) for disk in report["disk"]),
        _line("torch", _torch(report)),
        _line("stack", ", ".join(f"{k} {v}" for k, v in report["versions"].items()) or "nothing installed"),
        _line("system", f"Python {report['python']}, {report['os']}"),
        *(_line("warning", warning) for warning in report["warnings"]),
    ]
    return "\n".join(lines)


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL_WIDTH}}{text}"


def _size(value: int | None) -> str:
    return "unknown" if value is None else format_bytes(value)


def _gpu_lines(report: Mapping[str, Any]) -> list[str]:
    driver = report["gpu_driver"]
    if driver["missing"]:
        return [_line("GPU", f"none ({driver['missing']})")]
    lines = [
        _line("driver", f"{driver['version'] or 'unknown'}, supports CUDA {driver['cuda'] or 'unknown'}")
    ]
    for gpu in report["gpus"]:
        lines.append(_line(f"GPU {gpu['index']}", _gpu(gpu)))
        lines += [_line("", f"slice {_slice(instance)}") for instance in gpu["mig"] or ()]
        lines += [_line("", f"used by {_process(process)}") for process in gpu["processes"] or ()]
    return lines if report["gpus"] else [*lines, _line("GPU", "none")]


def _gpu(gpu: Mapping[str, Any]) -> str:
    if gpu["is_lost"]:
        return f"{gpu['name'] or 'unknown card'}: does not answer"
    known = "" if gpu["profile"] else " (not in the catalogue)"
    capability = ".".join(map(str, gpu["compute_capability"] or ())) or "unknown"
    memory = f"{_size(gpu['usable_bytes'] or gpu['total_bytes'])} usable, {_size(gpu['free_bytes'])} free"
    parts = [
        f"{gpu['name']}{known}",
        "shares the system's RAM" if gpu["shares_host_memory"] else memory,
        f"compute capability {capability}",
        *([f"ECC {'on' if gpu['is_ecc_on'] else 'off'}"] if gpu["is_ecc_on"] is not None else []),
        *([f"{gpu['load']['temperature_c']} °C"] if gpu["load"]["temperature_c"] is not None else []),
    ]
    return "; ".join(parts)


def _slice(instance: Mapping[str, Any]) -> str:
    memory = instance["memory"]
    return f"{instance['name']}: {_size(memory and memory['free_bytes'])} free"


def _process(process: Mapping[str, Any]) -> str:
    who = process["program"] or f"process {process['pid']}"
    owner = f" ({process['owner']})" if process["owner"] else ""
    return f"{who}{owner}: {_size(process['used_bytes'])}"


def _cpu(cpu: Mapping[str, Any]) -> str:
    total = cpu["num_logical_cpus"]
    limit = f" of {total}" if total and total != cpu["num_cpus"] else ""
    features = ", ".join(cpu["features"]) or "no features of interest"
    return f"{cpu['model']}; {cpu['num_cpus']}{limit} logical processors; {features}"


def _memory(memory: Mapping[str, Any]) -> str:
    if "error" in memory:
        return f"unknown ({memory['error']})"
    limit = memory["limit_bytes"]
    suffix = f"; this container may use {format_bytes(limit)}" if limit else ""
    return (
        f"{format_bytes(memory['total_bytes'])}, {format_bytes(memory['available_bytes'])} available{suffix}"
    )


def _disk(disk: Mapping[str, Any]) -> str:
    if "error" in disk:
        return f"{disk['what']}: unknown ({disk['error']})"
    return f"{disk['what']}: {format_bytes(disk['free_bytes'])} free of {format_bytes(disk['total_bytes'])}"


def _torch(report: Mapping[str, Any]) -> str:
    torch = report["torch"]
    version = report["versions"].get("torch", "")
    if "error" in torch:
        return f"{version} {torch['error']}".strip()
    build = (
        f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPU build"
    )
    architectures = f"; code for {', '.join(torch['arch_list'])}" if torch["arch_list"] else ""
    return f"{version}, {build}, {torch['num_threads']} threads{architectures}"
