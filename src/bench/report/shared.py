"""Parts that all reports have: environment, machine, versions, the setup in words, the plan to reproduce it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bench.labels import describe
from bench.report.content import Code, Facts
from bench.terms import is_number
from planner.catalog import find_gpu
from planner.errors import FinefitError
from planner.planfile import format_plan
from planner.render import printable
from planner.render_estimate import describe_batch, describe_method, describe_precision, describe_step
from planner.setup import TrainSetup
from planner.specs import GpuProfile, Machine
from planner.units import format_bytes, format_bytes_finely

MAX_TEXT = 240
"""Of one value; a report is for people."""

_ENVIRONMENT = (
    ("GPU", "gpu_name", str),
    ("GPU memory", "gpu_total_bytes", format_bytes),
    ("driver", "driver", str),
    ("CUDA", "cuda", str),
    ("processor", "cpu_model", str),
    ("usable processors", "num_cpus", str),
    ("threads of torch", "num_threads", str),
    ("RAM", "ram_bytes", format_bytes),
    ("system", "os", str),
    ("Python", "python", str),
    ("finefit", "finefit", str),
    ("commit", "commit", str),
    ("highest temperature", "max_temperature_c", lambda value: f"{value:.0f} °C"),
    ("mean power of the card", "mean_power_w", lambda value: f"{value:.0f} W"),
    ("highest power of the card", "max_power_w", lambda value: f"{value:.0f} W"),
    ("lowest clock of the card", "min_clock_hz", lambda value: f"{value / 1e9:.2f} GHz"),
    ("lowest clock of the processor", "min_cpu_clock_hz", lambda value: f"{value / 1e9:.2f} GHz"),
    ("highest clock of the processor", "max_cpu_clock_hz", lambda value: f"{value / 1e9:.2f} GHz"),
    ("throttled, the processor", "cpu_throttles", lambda value: f"{value:.0f} times"),
    ("taken by the hypervisor", "steal_share", lambda value: f"{100 * value:.1f} %"),
    ("pages read back from disk", "page_reads", lambda value: f"{value:.0f}"),
    ("others on the processors", "others_cpu_share", lambda value: f"{100 * value:.0f} %"),
    ("waited for a processor", "cpu_wait_share", lambda value: f"{100 * value:.0f} % of its time"),
)
_TEXTS = (
    "gpu_name",
    "driver",
    "cuda",
    "cpu_model",
    "num_cpus",
    "num_threads",
    "os",
    "python",
    "finefit",
    "commit",
)
"""Shown whatever they are; the others only if they are numbers."""


def clip(value: Any) -> str:
    """A value on one line, without what could steer a terminal, of bounded length."""
    plain = printable(str(value))
    return plain if len(plain) <= MAX_TEXT else f"{plain[:MAX_TEXT]} …"


def environment_facts(environment: Mapping[str, Any]) -> Facts | None:
    """The computer and the software of a result; what a record doesn't say is left out."""
    pairs = [
        (name, clip(show(environment[key])))
        for name, key, show in _ENVIRONMENT
        if environment.get(key) is not None and (key in _TEXTS or is_number(environment[key]))
    ]
    versions = environment.get("versions")
    if isinstance(versions, Mapping) and versions:
        pairs.append(("versions", clip(", ".join(f"{name} {version}" for name, version in versions.items()))))
    return Facts(title="", pairs=tuple(pairs)) if pairs else None


def setup_facts(setup: TrainSetup, gpu: str) -> Facts:
    """A setup in words."""
    pairs = (
        ("model", clip(setup.model_label)),
        ("method", f"{describe_method(setup)}; {describe_precision(setup)}"),
        ("batch", describe_batch(setup)),
        ("step", describe_step(setup)),
        ("GPU", clip(gpu)),
    )
    return Facts(title="", pairs=tuple((name, clip(value)) for name, value in pairs))


def label(setup: TrainSetup) -> str:
    """A setup in a few words."""
    return clip(describe(setup))


def reproduce(setup: TrainSetup, gpu: str, command: str, versions: Any) -> list[Code]:
    """The packages to install, the plan to save, the command to type, in the order in which they are done."""
    plan = Code(title="Save as plan.yaml", text=format_plan(setup, gpu, {}), is_folded=True)
    command_block = Code(title="Then run", text=command)
    if not isinstance(versions, Mapping):
        return [plan, command_block]
    names = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    words = [f"{name}=={str(versions[name]).partition('+')[0]}" for name in names if name in versions]
    install = Code(title="With these versions", text=clip(f"pip install {' '.join(words)}"))
    return [*([install] if words else []), plan, command_block]


def machine_of(gpu: str, environment: Mapping[str, Any], num_gpus: int) -> Machine:
    """The machine of a record: a card by its name, else the processor that the environment describes.

    Raises FinefitError where neither says enough.
    """
    name = gpu.partition(":")[0]
    if name not in ("cpu", "local"):
        return Machine(gpu=find_gpu(name), num_gpus=num_gpus)
    ram_bytes = environment.get("ram_bytes")
    if type(ram_bytes) is not int or ram_bytes <= 0:
        raise FinefitError("the record doesn't say how much memory the machine has")
    profile = GpuProfile(
        name="cpu",
        vendor="unknown",
        architecture=clip(environment.get("cpu_model")),
        backend="cpu",
        modelled=True,
        memory_bytes=ram_bytes,
        usable_bytes=ram_bytes,
        bitsandbytes=True,
        unified_memory=True,
    )
    return Machine(gpu=profile, num_gpus=num_gpus, free_bytes=ram_bytes, host_bytes=ram_bytes)


def percent(share: float | None) -> str:
    """A signed share in words."""
    return "" if share is None else f"{100 * share:+.1f} %".replace("-0.0", "0.0").replace("+0.0", "0.0")


def size(num_bytes: float | None) -> str:
    """Bytes in words; nothing where they aren't known."""
    return "" if num_bytes is None else format_bytes_finely(num_bytes)


def unique(lines: Iterable[str]) -> tuple[str, ...]:
    """Each line once, clipped, in order."""
    return tuple(dict.fromkeys(clip(line) for line in lines))
