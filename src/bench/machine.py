"""The machine that finefit runs on as a planner's Machine: its cards by NVML, else its processor and RAM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.cards import card_profile, visible_cards
from bench.hardware import hardware_report
from bench.hardware_text import format_report
from bench.host import ROOT, Cpu, HostMemory, read_cpu, read_memory
from bench.nvml import NO_DRIVER, Card, Cards, Nvml, read_cards
from bench.nvml_driver import Pynvml
from planner.errors import FinefitError, MissingExtraError
from planner.specs import GpuProfile, Machine
from planner.units import GIB, format_bytes

__all__ = ["cpu_machine", "format_report", "hardware_report", "local_machine"]

HOST_RESERVE_BYTES = GIB
"""RAM left to the system and other programs when a CPU or a card with unified memory trains: a convention of
finefit, since using the last gigabyte makes the system swap or kill."""

EQUAL_MEMORY = 0.01
"""Cards whose totals differ by at most this share are one model; drivers report a few MiB more or less."""

_CUDA_MARKS = ("proc/driver/nvidia", "dev/nvidiactl")


def local_machine(
    nvml: Nvml | None = None, *, root: Path = ROOT, environ: Mapping[str, str] = os.environ
) -> Machine:
    """The accelerators that a process started here would see, with what is free on them now; else the CPU.

    CUDA_VISIBLE_DEVICES is honoured. Unequal cards: the smallest one, and the profile's note says so.
    Raises FinefitError when there is an NVIDIA card but its driver doesn't answer, MissingExtraError when
    the package that asks it is missing.
    """
    cards = read_cards(nvml or Pynvml())
    memory = read_memory(root)
    if cards.missing:
        _check_really_missing(cards, root)
        return cpu_machine(read_cpu(root), memory)
    visible = visible_cards(cards.cards, environ.get("CUDA_VISIBLE_DEVICES"))
    if not visible:
        return cpu_machine(read_cpu(root), memory)
    alive = [card for card in visible if not card.is_lost and card.name]
    if not alive:
        raise FinefitError(f"{_first_problem(cards)}; restart it, or name a card with --gpu")
    return _gpu_machine(alive, memory)


def cpu_machine(cpu: Cpu, memory: HostMemory) -> Machine:
    """The processor as the accelerator: its memory is the RAM that is available less HOST_RESERVE_BYTES."""
    usable = max(0, memory.available_bytes - HOST_RESERVE_BYTES)
    profile = GpuProfile(
        name="cpu",
        vendor=cpu.vendor,
        architecture=cpu.model,
        backend="cpu",
        modelled=True,
        memory_bytes=memory.usable_total_bytes,
        usable_bytes=usable,
        bf16=cpu.has_bf16,
        flash_attention=False,
        bitsandbytes=True,
        unified_memory=True,
        note=f"{_reserve_note()}; {cpu.num_cpus} logical processors",
        sources={"memory_bytes": "this system", "usable_bytes": _reserve_note(), "bf16": "/proc/cpuinfo"},
    )
    return Machine(gpu=profile, free_bytes=usable, host_bytes=memory.available_bytes, is_local=True)


def _gpu_machine(cards: Sequence[Card], memory: HostMemory) -> Machine:
    profiles = [card_profile(card) for card in cards]
    if profiles[0].unified_memory:
        return _unified_machine(profiles[0], memory)
    smallest = min(profiles, key=lambda profile: profile.memory_bytes)
    if any(not _is_equal(profile, smallest) for profile in profiles):
        names = ", ".join(f"{p.name} ({format_bytes(p.memory_bytes)})" for p in profiles)
        note = f"unequal cards ({names}): planned for the smallest; CUDA_VISIBLE_DEVICES chooses another"
        cards = [card for card, profile in zip(cards, profiles, strict=True) if profile is smallest]
        smallest = replace(smallest, note=note)
    free = [_free_bytes(card) for card in cards]
    # A CUDA process sees one MIG instance at most, however many there are.
    is_sliced = any(card.mig is not None for card in cards)
    return Machine(
        gpu=smallest,
        num_gpus=1 if is_sliced else len(cards),
        free_bytes=min(f for f in free if f is not None) if None not in free else None,
        host_bytes=memory.available_bytes,
        is_local=True,
    )


def _is_equal(a: GpuProfile, b: GpuProfile) -> bool:
    return a.name == b.name and abs(a.memory_bytes - b.memory_bytes) <= EQUAL_MEMORY * b.memory_bytes


def _free_bytes(card: Card) -> int | None:
    memories = [instance.memory for instance in card.mig] if card.mig else [card.memory]
    free = [memory.free_bytes for memory in memories if memory]
    return min(free) if free else None


def _unified_machine(profile: GpuProfile, memory: HostMemory) -> Machine:
    """A card that shares the system's RAM: what the driver calls free says nothing about it."""
    usable = max(0, memory.available_bytes - HOST_RESERVE_BYTES)
    sources = {"memory_bytes": "this system", "usable_bytes": _reserve_note()}
    profile = replace(
        profile,
        memory_bytes=memory.usable_total_bytes,
        usable_bytes=usable,
        note=_reserve_note(),
        sources={**profile.sources, **sources},
    )
    return Machine(gpu=profile, free_bytes=usable, host_bytes=memory.available_bytes, is_local=True)


def _reserve_note() -> str:
    return f"memory that this system has available now, less {format_bytes(HOST_RESERVE_BYTES)} left to it"


def _check_really_missing(cards: Cards, root: Path) -> None:
    """A broken driver must not turn a GPU machine into a CPU machine in silence."""
    if cards.missing_reason in NO_DRIVER:
        return
    if cards.missing_reason != "ModuleMissing":
        raise FinefitError(f"{cards.missing}; or name the card with --gpu")
    if any((root / mark).exists() for mark in _CUDA_MARKS):
        raise MissingExtraError("… --gpu local", "train", "nvidia-ml-py")


def _first_problem(cards: Cards) -> str:
    return cards.problems[0] if cards.problems else "this machine's GPU doesn't answer"
