"""NVIDIA cards as profiles: which ones a process would see, and the catalogue's facts with their own memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from bench.nvml import Card, CardMemory
from planner.catalog import find_gpu
from planner.errors import FinefitError, UnknownNameError, UsageError
from planner.specs import GpuProfile
from planner.units import GIB

_UNKNOWN_CARD = "not in finefit's catalogue: memory and capabilities are the driver's, speed is unknown"
_DRIVER_SAYS = "this machine's driver"


def visible_cards(cards: Sequence[Card], variable: str | None) -> list[Card]:
    """The cards that CUDA_VISIBLE_DEVICES leaves, in its order; a MIG instance counts as the card it is cut from.

    As CUDA does, the list ends at the first entry that names nothing. Numbers are taken in NVML's order.
    """
    if variable is None:
        return list(cards)
    found: list[Card] = []
    for entry in variable.split(","):
        card = _named_card(cards, entry.strip())
        if card is None:
            break
        found.append(card)
    return found


def _named_card(cards: Sequence[Card], entry: str) -> Card | None:
    if entry.isascii() and entry.isdigit():
        return next((card for card in cards if card.index == int(entry)), None)
    for card in cards:
        if len(entry) > len("GPU-") and (card.uuid or "").startswith(entry):
            return card
        for instance in card.mig or ():
            if len(entry) > len("MIG-") and (instance.uuid or "").startswith(entry):
                return replace(card, mig=(instance,))
    return None


def usable_bytes(memory: CardMemory) -> int | None:
    """The total that torch will report: nvidia-smi's less what the driver keeps; None where it doesn't say.

    On an A100-80GB 81,920 - 765 MiB = 79.25 GiB, the total in published out-of-memory messages.
    """
    return None if memory.reserved_bytes is None else memory.total_bytes - memory.reserved_bytes


def card_profile(card: Card) -> GpuProfile:
    """The catalogue's facts with this card's own memory, or what the driver knows of a card it doesn't list."""
    profile = _catalogue_profile(card) or _driver_profile(card)
    if card.mig is not None:
        return _slice_profile(profile, card)
    if card.memory is None:
        return profile
    own = usable_bytes(card.memory)
    known = {"memory_bytes": _DRIVER_SAYS} | ({"usable_bytes": _DRIVER_SAYS} if own else {})
    return replace(
        profile,
        memory_bytes=card.memory.total_bytes,
        usable_bytes=own or profile.usable_bytes,
        sources={**profile.sources, **known},
    )


def _catalogue_profile(card: Card) -> GpuProfile | None:
    """The entry that the driver's name means; its memory tells variants of one name apart."""
    assert card.name is not None
    try:
        return find_gpu(card.name)
    except UnknownNameError:
        return None
    except UsageError:
        if card.memory is None:
            return None
    try:
        return find_gpu(f"{card.name} {round(card.memory.total_bytes / GIB)}GB")
    except UsageError:
        return None


def _driver_profile(card: Card) -> GpuProfile:
    """A card that no profile knows: capabilities follow its compute capability (CUDA's and the libraries' rules)."""
    if card.memory is None:
        raise FinefitError(f"{card.name}: {_UNKNOWN_CARD}; and it reports no memory: name a card with --gpu")
    capability = card.compute_capability or (0, 0)
    return GpuProfile(
        name=card.name or "",
        vendor="nvidia",
        architecture=f"compute capability {capability[0]}.{capability[1]}",
        backend="cuda",
        modelled=True,
        compute_capability=card.compute_capability,
        memory_bytes=card.memory.total_bytes,
        bf16=capability >= (8, 0),
        flash_attention=capability >= (8, 0),
        bitsandbytes=capability >= (6, 0),
        fp8=capability >= (8, 9),
        note=_UNKNOWN_CARD,
        sources={"memory_bytes": _DRIVER_SAYS, "compute_capability": _DRIVER_SAYS},
    )


def _slice_profile(profile: GpuProfile, card: Card) -> GpuProfile:
    """The smallest MIG instance of a card; nobody publishes the peaks of a slice, so they are unknown."""
    instances = [instance for instance in card.mig or () if instance.memory]
    if not instances:
        raise FinefitError(
            f"GPU {card.index} is in MIG mode without an instance to use (see `nvidia-smi -L`)"
        )
    smallest = min(instances, key=lambda instance: instance.memory.total_bytes if instance.memory else 0)
    assert smallest.memory is not None
    label = re.sub(r".*\bMIG\b", "MIG", smallest.name)
    return replace(
        profile,
        name=f"{profile.name} {label}",
        memory_bytes=smallest.memory.total_bytes,
        usable_bytes=usable_bytes(smallest.memory) or smallest.memory.total_bytes,
        bandwidth_bytes_per_s=None,
        flops={},
        note="a slice of the card: its speed is unknown",
        sources={"memory_bytes": _DRIVER_SAYS, "usable_bytes": _DRIVER_SAYS},
    )
