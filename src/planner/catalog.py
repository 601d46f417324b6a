"""profiles/gpus -> GpuProfile: facts in bytes, FLOP/s and watts, each with its source."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from planner.errors import NotModelledError, ProfileError, UsageError, fold_name
from planner.gpu_names import CardWords, GpuNames
from planner.index import profiles_dir, raw_profiles
from planner.specs import GpuProfile
from planner.units import MIB, gib_to_bytes

__all__ = [
    "find_catalog_gpu",
    "find_gpu",
    "gpus",
    "parse_gpu",
    "profiles_dir",
    "raw_gpu",
    "raw_profiles",
    "usable_bytes_or_bound",
]

ARCHITECTURES = "architectures"
CAPABILITIES = ("bf16", "flash_attention", "bitsandbytes", "fp8")

PEAKS = {
    "fp32_tflops": "float32",
    "tf32_tflops": "tf32",
    "fp16_tflops": "float16",
    "bf16_tflops": "bfloat16",
    "fp8_tflops": "fp8",
    "int8_tops": "int8",
}
"""Keys of the dense peaks -> names of GpuProfile.flops."""

FIELDS = {
    "memory_gib": "memory_bytes",
    "torch_total_gib": "usable_bytes",
    "bandwidth_gb_s": "bandwidth_bytes_per_s",
    "link_both_ways_gb_s": "link_bytes_per_s",
    "pcie_generation": "pcie_bytes_per_s",
    **{key: f"flops.{dtype}" for key, dtype in PEAKS.items()},
}
"""Keys whose GpuProfile field has another name; the sources are filed under the field."""

GIGA, TERA = 1e9, 1e12

PCIE_LANE_BYTES_PER_S = {
    generation: giga_transfers * GIGA / 8 * 128 / 130
    for generation, giga_transfers in {3: 8, 4: 16, 5: 32}.items()
}
"""One lane, one direction: 8, 16, 32 GT/s at 128b/130b coding (PCI Express base specifications 3 to 5)."""

MOST_COUNT_DIGITS = 6

COMPARABLE_MEMORY = 1.5
"""Cards count as comparable when their memory differs by at most this factor: what a driver keeps grows
with the memory, but less than in proportion, so a small card's share would be far too much for a large one."""


def gpus() -> Mapping[str, GpuProfile]:
    """Every accelerator by its name, in the order of the files."""
    return {name: gpu_profile(name) for name in _raw_cards()}


def find_gpu(text: str) -> GpuProfile:
    """The card that a person's spelling means.

    Raises UnknownNameError (with the nearest names) or UsageError (listing the cards it could be).
    """
    return gpu_profile(_names().resolve(text))


def find_catalog_gpu(text: str) -> GpuProfile:
    """The card that a price list or a published table means: "H100" is the SXM5 there.

    Raises as find_gpu does.
    """
    name = _catalog_names().get(fold_name(text))
    return find_gpu(text) if name is None else gpu_profile(name)


def parse_gpu(text: str) -> tuple[GpuProfile, int]:
    """NAME or NAME:COUNT -> the card and how many. Raises UsageError when the count is no whole number from 1."""
    name, colon, tail = text.rpartition(":")
    if not colon:
        return find_gpu(text), 1
    count = tail.strip()
    if not (count.isascii() and count.isdigit() and len(count) <= MOST_COUNT_DIGITS and int(count) > 0):
        raise UsageError(f"GPU {text!r}: the count after ':' must be a whole number from 1, as in rtx-4090:2")
    return find_gpu(name), int(count)


def raw_gpu(name: str) -> Mapping[str, Any]:
    """A card's entry as written, units in its keys. `name` must be the catalogue's own."""
    return _raw_cards()[name][1]


def usable_bytes_or_bound(gpu: GpuProfile) -> tuple[int, str]:
    """What torch can have of one card, and in words where that comes from.

    The total that torch reports where somebody saw it; else a bound on the safe side: the card's total less the
    largest share that was missing on any comparable card whose total is known (same architecture and at most
    1.5 times more or less memory; else same vendor and such memory; else the vendor's nearest in memory). "Total"
    is nvidia-smi's if the card's is known, because that already lacks what ECC takes, else the marketed memory.
    Tried on each card with a known total as if it had none: at most 2.5 % too much where nvidia-smi's total is
    known, 0.7 % too little on average (P40, without it and with ECC on: 6.4 % too much).
    Raises NotModelledError when no card of the vendor has a known total.
    """
    if gpu.usable_bytes is not None:
        return gpu.usable_bytes, gpu.sources.get("usable_bytes", "measured")
    key, total_bytes = _total(gpu)
    peers = _comparable(gpu, key)
    if not peers:
        raise NotModelledError(f"{gpu.name}: unknown how much of its memory a process can have")
    share, peer = max((_missing_share(raw, key), name) for name, raw in peers)
    label = "nvidia-smi's total" if key == "nvidia_smi_mib" else "the marketed memory"
    reason = f"derived: {label} less {share:.1%}, the most that torch misses on a comparable card ({peer})"
    return round(total_bytes * (1 - share)), reason


@functools.cache
def gpu_profile(name: str) -> GpuProfile:
    """The profile of a card by the catalogue's own name."""
    stem, card = _raw_cards()[name]
    architecture = _architecture(stem)
    capability = card.get("compute_capability")
    return GpuProfile(
        name=name,
        aliases=tuple(card.get("aliases", ())),
        vendor=architecture["vendor"],
        architecture=architecture["title"],
        backend=architecture["backend"],
        modelled=architecture["modelled"],
        compute_capability=None if capability is None else _capability(capability),
        memory_bytes=gib_to_bytes(card["memory_gib"]),
        usable_bytes=_optional(card, "torch_total_gib", gib_to_bytes),
        bandwidth_bytes_per_s=_scaled(card, "bandwidth_gb_s", GIGA),
        flops={dtype: card[key] * TERA for key, dtype in PEAKS.items() if key in card},
        tdp_w=card.get("tdp_w"),
        link_bytes_per_s=_scaled(card, "link_both_ways_gb_s", GIGA / 2),
        pcie_bytes_per_s=_pcie_bytes_per_s(card),
        unified_memory=card.get("unified_memory", False),
        launch_price_usd=card.get("launch_price_usd"),
        launch_price_cny=card.get("launch_price_cny"),
        release_date=card.get("release_date"),
        note="; ".join(part["note"] for part in (card, architecture) if "note" in part) or None,
        sources=_sources(card) | _sources(architecture),
        **{field: architecture[field] for field in CAPABILITIES},
    )


@functools.cache
def _raw_cards() -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    """Card name -> (architecture's file stem, entry)."""
    return {
        name: (stem, card)
        for stem, content in raw_profiles("gpus").items()
        if stem != ARCHITECTURES
        for name, card in content["gpus"].items()
    }


def _architecture(stem: str) -> Mapping[str, Any]:
    known: Mapping[str, Mapping[str, Any]] = raw_profiles("gpus")[ARCHITECTURES]["architectures"]
    if stem not in known:
        raise ProfileError(f"gpus/{stem}.toml: no such architecture in gpus/{ARCHITECTURES}.toml")
    return known[stem]


def card_words() -> Iterator[CardWords]:
    """What the name resolver has to know of each card."""
    for name, (_, card) in _raw_cards().items():
        yield CardWords(
            gpu=name,
            spellings=(name, *card.get("aliases", ())),
            memory_gib=card["memory_gib"],
            memory_type=card["memory_type"],
        )


@functools.cache
def _names() -> GpuNames:
    return GpuNames(card_words())


@functools.cache
def _catalog_names() -> Mapping[str, str]:
    cards = _raw_cards().items()
    return {fold_name(text): name for name, (_, card) in cards for text in card.get("catalog_names", ())}


def _sources(entry: Mapping[str, Any]) -> dict[str, str]:
    return {FIELDS.get(key, key): source["is"] for source in entry["sources"] for key in source["of"]}


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def _optional(card: Mapping[str, Any], key: str, convert: Any) -> Any:
    return convert(card[key]) if key in card else None


def _scaled(card: Mapping[str, Any], key: str, factor: float) -> float | None:
    return card[key] * factor if key in card else None


def _pcie_bytes_per_s(card: Mapping[str, Any]) -> float | None:
    if "pcie_generation" not in card:
        return None
    return PCIE_LANE_BYTES_PER_S[card["pcie_generation"]] * float(card["pcie_lanes"])


def _total(gpu: GpuProfile) -> tuple[str, int]:
    """The key and the bytes of the best total that is known short of torch's own."""
    card = _raw_cards().get(gpu.name, ("", {}))[1]
    if "nvidia_smi_mib" in card:
        return "nvidia_smi_mib", card["nvidia_smi_mib"] * MIB
    return "memory_gib", gpu.memory_bytes


def _comparable(gpu: GpuProfile, key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The closest circle of other cards that has at least one with both torch's total and `key`."""
    others = ((name, *entry) for name, entry in _raw_cards().items() if name != gpu.name)
    known = [(name, stem, card) for name, stem, card in others if _is_peer(card, key)]
    vendor = [entry for entry in known if _architecture(entry[1])["vendor"] == gpu.vendor]
    vendor.sort(key=lambda entry: _memory_ratio(entry[2], gpu.memory_bytes))
    sized = [entry for entry in vendor if _memory_ratio(entry[2], gpu.memory_bytes) <= COMPARABLE_MEMORY]
    same = [entry for entry in sized if _architecture(entry[1])["title"] == gpu.architecture]
    return [(name, card) for name, _, card in same or sized or vendor[:1]]


def _is_peer(card: Mapping[str, Any], key: str) -> bool:
    """Unified memory is rationed by the system, not by the driver: no guide to a card's own memory."""
    return "torch_total_gib" in card and key in card and not card.get("unified_memory", False)


def _memory_ratio(card: Mapping[str, Any], memory_bytes: int) -> float:
    """How many times more or less memory the card has; at least 1."""
    ratio = gib_to_bytes(card["memory_gib"]) / memory_bytes
    return max(ratio, 1 / ratio)


def _missing_share(card: Mapping[str, Any], key: str) -> float:
    lowest_gib = card.get("torch_total_seen_gib", [card["torch_total_gib"]])[0]
    total_bytes = card[key] * MIB if key == "nvidia_smi_mib" else gib_to_bytes(card[key])
    return 1 - gib_to_bytes(lowest_gib) / total_bytes
