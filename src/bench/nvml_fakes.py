"""NVIDIA cards that answer from recorded values: what the code does on hardware that is not here.

`FakeNvml(cards=[...])` behaves like a driver with these cards. Its `failures` say which queries fail and how:
("memory", 1): "GpuIsLost" makes the memory query of card 1 raise; ("memory", None) does so on every card.
The machines below are states that drivers are known to be in; each one is a function, so that nobody shares one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from bench.nvml import CardLoad, CardMemory, CardProcess, NvmlQueryError
from planner.units import GIB, MIB

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FakeCard:
    """A recorded card, or a MIG instance of one. `memory` None: the driver reports none (unified memory)."""

    name: str
    uuid: str = "GPU-00000000"
    compute_capability: tuple[int, int] = (8, 0)
    memory: CardMemory | None = None
    is_ecc_on: bool | None = None
    instances: tuple[FakeCard, ...] | None = None
    processes: tuple[CardProcess, ...] = ()
    load: CardLoad = field(default_factory=CardLoad)


@dataclass
class FakeNvml:
    """`Nvml` over recorded cards. `open_reason`: why even opening the library fails."""

    cards: Sequence[FakeCard] = ()
    failures: Mapping[tuple[str, int | None], str] = field(default_factory=dict)
    open_reason: str | None = None
    driver: str = "580.95.05"
    cuda: tuple[int, int] = (13, 0)
    num_open: int = 0

    def open(self) -> None:
        """Fails with `open_reason`, if there is one."""
        if self.open_reason:
            raise NvmlQueryError(self.open_reason)
        self.num_open += 1

    def close(self) -> None:
        """Count, so that a test can see that nothing stays open."""
        self.num_open -= 1

    def driver_version(self) -> str:
        """See `Nvml`."""
        self._fail("driver_version", None)
        return self.driver

    def cuda_version(self) -> tuple[int, int]:
        """See `Nvml`."""
        self._fail("cuda_version", None)
        return self.cuda

    def num_devices(self) -> int:
        """See `Nvml`."""
        self._fail("num_devices", None)
        return len(self.cards)

    def device(self, index: int) -> FakeCard:
        """See `Nvml`."""
        self._fail("device", index)
        return self.cards[index]

    def name(self, handle: FakeCard) -> str:
        """See `Nvml`."""
        return self._of(handle, "name", handle.name)

    def uuid(self, handle: FakeCard) -> str:
        """See `Nvml`."""
        return self._of(handle, "uuid", handle.uuid)

    def compute_capability(self, handle: FakeCard) -> tuple[int, int]:
        """See `Nvml`."""
        return self._of(handle, "compute_capability", handle.compute_capability)

    def memory(self, handle: FakeCard) -> CardMemory:
        """See `Nvml`."""
        return self._of(handle, "memory", handle.memory)

    def is_ecc_on(self, handle: FakeCard) -> bool:
        """See `Nvml`."""
        return self._of(handle, "is_ecc_on", handle.is_ecc_on)

    def mig_handles(self, handle: FakeCard) -> tuple[FakeCard, ...] | None:
        """See `Nvml`."""
        self._of(handle, "mig_handles", True)
        return handle.instances

    def processes(self, handle: FakeCard) -> tuple[CardProcess, ...]:
        """See `Nvml`."""
        return self._of(handle, "processes", handle.processes)

    def load(self, handle: FakeCard) -> CardLoad:
        """See `Nvml`."""
        return self._of(handle, "load", handle.load)

    def _of(self, handle: FakeCard, query: str, value: T | None) -> T:
        index = next((i for i, card in enumerate(self.cards) if card is handle), None)
        self._fail(query, index)
        if value is None:
            raise NvmlQueryError("NotSupported", "Not Supported")
        return value

    def _fail(self, query: str, index: int | None) -> None:
        reason = self.failures.get((query, index)) or self.failures.get((query, None))
        if reason:
            raise NvmlQueryError(reason)


A100 = FakeCard(
    name="NVIDIA A100-SXM4-80GB",
    uuid="GPU-a100",
    memory=CardMemory(total_bytes=81_920 * MIB, free_bytes=81_150 * MIB, reserved_bytes=765 * MIB),
    is_ecc_on=True,
    load=CardLoad(temperature_c=34, power_w=61.0, power_limit_w=400.0, clock_hz=1.41e9, max_clock_hz=1.41e9),
)
"""81,920 MiB, of which the driver keeps 765: torch reports 79.25 GiB, as published out-of-memory messages do."""

RTX_4090 = FakeCard(
    name="NVIDIA GeForce RTX 4090",
    uuid="GPU-4090",
    compute_capability=(8, 9),
    memory=CardMemory(total_bytes=24_564 * MIB, free_bytes=24_210 * MIB, reserved_bytes=346 * MIB),
    is_ecc_on=False,
    load=CardLoad(temperature_c=41, power_w=22.0, power_limit_w=450.0, clock_hz=2.1e8, max_clock_hz=3.1e9),
)

RTX_3060 = FakeCard(
    name="NVIDIA GeForce RTX 3060",
    uuid="GPU-3060",
    compute_capability=(8, 6),
    memory=CardMemory(total_bytes=12_288 * MIB, free_bytes=12_020 * MIB, reserved_bytes=258 * MIB),
)

GB10 = FakeCard(name="NVIDIA GB10", uuid="GPU-gb10", compute_capability=(12, 1), memory=None)
"""Unified memory: the driver answers "not supported" to the memory query."""


def several_equal_cards(count: int = 4) -> FakeNvml:
    """A server with equal cards; the last one has 10 GiB less free."""
    cards = [replace(A100, uuid=f"GPU-a100-{i}") for i in range(count)]
    cards[-1] = busy(cards[-1], 10 * GIB)
    return FakeNvml(cards)


def unequal_cards() -> FakeNvml:
    """A workstation with a large and a small card."""
    return FakeNvml([RTX_4090, RTX_3060])


def busy(card: FakeCard, used_bytes: int, pid: int = 4_194_000) -> FakeCard:
    """The card with a process of somebody else on it."""
    assert card.memory is not None
    memory = replace(card.memory, free_bytes=card.memory.free_bytes - used_bytes)
    return replace(card, memory=memory, processes=(CardProcess(pid=pid, used_bytes=used_bytes),))


def busy_card() -> FakeNvml:
    """A card with 20 GiB taken, and hot: it is throttling."""
    card = busy(RTX_4090, 20 * GIB)
    load = CardLoad(temperature_c=87, power_w=449.0, power_limit_w=450.0, throttling=("power cap",))
    return FakeNvml([replace(card, load=load)])


def mig_card() -> FakeNvml:
    """An A100 cut into a 3g.40gb and a 2g.20gb instance; the card's own memory query still answers."""
    sizes = (("3g.40gb", 40_192 * MIB), ("2g.20gb", 19_968 * MIB))
    instances = tuple(
        FakeCard(
            name=f"NVIDIA A100-SXM4-80GB MIG {slice_name}",
            uuid=f"MIG-{slice_name}",
            memory=CardMemory(total_bytes=size, free_bytes=size - 37 * MIB, reserved_bytes=0),
        )
        for slice_name, size in sizes
    )
    return FakeNvml([replace(A100, instances=instances)])


def missing_driver() -> FakeNvml:
    """No libnvidia-ml: a machine without an NVIDIA driver."""
    return FakeNvml(open_reason="LibraryNotFound")


def mismatched_driver() -> FakeNvml:
    """The driver's package was updated while the old kernel module stays loaded."""
    return FakeNvml(open_reason="LibRmVersionMismatch")


def dying_card(reason: str = "GpuIsLost") -> FakeNvml:
    """Two cards, the second one fails at its memory query."""
    cards = [replace(A100, uuid="GPU-a100-0"), replace(A100, uuid="GPU-a100-1")]
    return FakeNvml(cards, failures={("memory", 1): reason})


def unified_memory() -> FakeNvml:
    """A DGX Spark."""
    return FakeNvml([GB10])
