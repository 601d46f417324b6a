"""NVIDIA cards as the driver sees them: a thin typed layer over NVML that survives a failing driver.

`Nvml` is the layer's contract; `bench.nvml_driver` asks the real driver, `bench.nvml_fakes` answers from
recorded values. `read_cards` turns either into plain dataclasses: whatever one
query can't say becomes None, and what went wrong becomes one line in `problems`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Handle = Any
"""What a layer uses to name one device or MIG instance; only that layer looks inside."""

THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""NVML's clock event reasons that slow a busy card (nvml.h, nvmlClocksEventReason*); idle is not among them."""

NO_DRIVER = ("LibraryNotFound", "DriverNotLoaded")
"""Reasons that mean: this machine has no working NVIDIA driver at all."""

LOST = ("GpuIsLost", "ResetRequired")
"""Reasons after which a card answers nothing more until it is reset."""


class NvmlQueryError(Exception):
    """A query that the driver refused; `reason` is NVML's own word for it ("NotSupported", "GpuIsLost" …)."""

    def __init__(self, reason: str, message: str = "") -> None:
        self.reason = reason
        super().__init__(message or reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class CardMemory:
    """Bytes of one card; `reserved_bytes` is what the driver keeps (None before driver 510)."""

    total_bytes: int
    free_bytes: int
    reserved_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CardProcess:
    """A process that holds memory on a card; `used_bytes` is None where the driver doesn't say (WSL, WDDM)."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CardLoad:
    """How a card is running now; what it doesn't report is None."""

    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    clock_hz: float | None = None
    max_clock_hz: float | None = None
    throttling: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class MigInstance:
    """One slice of a card in MIG mode, with its own memory."""

    index: int
    name: str
    uuid: str | None
    memory: CardMemory | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One card; `memory` is None where the driver has none to report (unified memory) or is failing."""

    index: int
    name: str | None
    uuid: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory: CardMemory | None = None
    is_ecc_on: bool | None = None
    mig: tuple[MigInstance, ...] | None = None
    processes: tuple[CardProcess, ...] | None = None
    load: CardLoad = CardLoad()
    is_lost: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Cards:
    """All cards of the machine. `missing` says in one line why there are none to ask, None if NVML answered."""

    cards: tuple[Card, ...] = ()
    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    problems: tuple[str, ...] = ()
    missing: str | None = None
    missing_reason: str | None = None


class Nvml(Protocol):
    """What finefit asks a driver. Every method may raise NvmlQueryError."""

    def open(self) -> None:
        """Load the driver's library."""

    def close(self) -> None:
        """Release it."""

    def driver_version(self) -> str:
        """The driver's version."""

    def cuda_version(self) -> tuple[int, int]:
        """The newest CUDA that the driver supports."""

    def num_devices(self) -> int:
        """Cards in the machine, whatever CUDA_VISIBLE_DEVICES says."""

    def device(self, index: int) -> Handle:
        """The handle of one card, in PCI order."""

    def name(self, handle: Handle) -> str:
        """The marketing name, as nvidia-smi prints it."""

    def uuid(self, handle: Handle) -> str:
        """The card's or instance's unique id."""

    def compute_capability(self, handle: Handle) -> tuple[int, int]:
        """Major and minor."""

    def memory(self, handle: Handle) -> CardMemory:
        """Memory now."""

    def is_ecc_on(self, handle: Handle) -> bool:
        """Whether error correction is active."""

    def mig_handles(self, handle: Handle) -> tuple[Handle, ...] | None:
        """The instances, None when MIG mode is off."""

    def processes(self, handle: Handle) -> tuple[CardProcess, ...]:
        """Compute and graphics processes with their memory."""

    def load(self, handle: Handle) -> CardLoad:
        """Temperature, power, clocks and throttling now."""


def read_cards(nvml: Nvml) -> Cards:
    """Everything about this machine's cards; never raises for what a driver may do."""
    ask = Asker("driver", stays=True)
    try:
        nvml.open()
    except NvmlQueryError as error:
        return Cards(missing=_why_missing(error), missing_reason=error.reason)
    try:
        read = [_read_card(nvml, index) for index in range(nvml.num_devices())]
        return Cards(
            cards=tuple(card for card, _ in read),
            driver_version=ask("version", nvml.driver_version),
            cuda_version=ask("CUDA version", nvml.cuda_version),
            problems=(*ask.problems, *(line for _, lines in read for line in lines)),
        )
    except NvmlQueryError as error:
        return Cards(missing=_why_missing(error), missing_reason=error.reason)
    finally:
        ask("closing", nvml.close)


@contextmanager
def opened(nvml: Nvml) -> Iterator[Nvml | None]:
    """The layer open for repeated queries, or None where there is no driver to ask."""
    try:
        nvml.open()
    except NvmlQueryError:
        yield None
        return
    try:
        yield nvml
    finally:
        Asker("driver")("closing", nvml.close)


class Asker:
    """Asks one source and remembers as `problems` what failed; a lost card is asked no more (a driver `stays`)."""

    def __init__(self, label: str, *, stays: bool = False) -> None:
        self.label, self.stays = label, stays
        self.problems: list[str] = []
        self.is_lost = False

    def __call__(self, what: str, query: Callable[[], T]) -> T | None:
        """The answer, or None. "Not supported" is an answer; everything else is a problem worth a line."""
        if self.is_lost:
            return None
        try:
            return query()
        except NvmlQueryError as error:
            self.is_lost = error.reason in LOST and not self.stays
            if error.reason != "NotSupported":
                self.problems.append(f"{self.label}: {what}: {error}")
            return None


def _why_missing(error: NvmlQueryError) -> str:
    if error.reason in NO_DRIVER:
        return "no NVIDIA driver found"
    if error.reason == "ModuleMissing":
        return "the package nvidia-ml-py is not installed: pip install 'finefit[train]'"
    if error.reason == "LibRmVersionMismatch":
        return "the NVIDIA driver was updated while loaded: restart the machine (or reload the kernel module)"
    return f"the NVIDIA driver does not answer: {error}"


def _read_card(nvml: Nvml, index: int) -> tuple[Card, list[str]]:
    ask = Asker(f"GPU {index}")
    handle = ask("handle", lambda: nvml.device(index))
    if handle is None:
        return Card(index=index, name=None, is_lost=True), ask.problems
    mig = ask("MIG", lambda: nvml.mig_handles(handle))
    card = Card(
        index=index,
        name=ask("name", lambda: nvml.name(handle)),
        uuid=ask("id", lambda: nvml.uuid(handle)),
        compute_capability=ask("compute capability", lambda: nvml.compute_capability(handle)),
        memory=ask("memory", lambda: nvml.memory(handle)),
        is_ecc_on=ask("ECC", lambda: nvml.is_ecc_on(handle)),
        mig=None if mig is None else tuple(_read_instance(nvml, ask, i, h) for i, h in enumerate(mig)),
        processes=ask("processes", lambda: nvml.processes(handle)),
        load=ask("load", lambda: nvml.load(handle)) or CardLoad(),
    )
    return replace(card, is_lost=ask.is_lost), ask.problems


def _read_instance(nvml: Nvml, ask: Asker, index: int, handle: Handle) -> MigInstance:
    return MigInstance(
        index=index,
        name=ask(f"MIG {index} name", lambda: nvml.name(handle)) or f"MIG {index}",
        uuid=ask(f"MIG {index} id", lambda: nvml.uuid(handle)),
        memory=ask(f"MIG {index} memory", lambda: nvml.memory(handle)),
    )


def throttle_reasons(bits: int) -> tuple[str, ...]:
    """The words for NVML's bit field of clock event reasons.

    >>> throttle_reasons(0x44)
    ('power cap', 'hardware thermal slowdown')
    """
    return tuple(word for bit, word in THROTTLE_REASONS.items() if bits & bit)
