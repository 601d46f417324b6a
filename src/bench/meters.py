"""Peaks of allocated memory by phase: torch.cuda's counters on a GPU, live tensors counted on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.timeline import StepLog


class PeakCounter(Protocol):
    """Something that knows how many bytes are allocated and how many were at most."""

    def now_bytes(self) -> int:
        """What is allocated now."""

    def peak_bytes(self) -> int:
        """The highest count since the last reset."""

    def reset(self) -> None:
        """Start the peak anew at what is allocated now."""

    def forget(self) -> None:
        """Start everything anew, as if nothing had run before."""

    def more_peaks(self) -> dict[str, int]:
        """Other peaks of the whole run, by their names in `Measured`."""

    def doubts(self) -> list[str]:
        """What makes these figures doubtful, one line each."""


class PhaseMeter:
    """The peak of each phase, and of everything between them: the `phase` that a TrainStep wants.

    A phase that is entered several times keeps its highest peak.
    """

    def __init__(self, counter: PeakCounter) -> None:
        self.counter = counter
        self.phases: dict[str, int] = {}
        self._highest = 0

    @property
    def peak_bytes(self) -> int:
        """The highest peak inside and outside of phases."""
        return max(self._highest, self.counter.peak_bytes())

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a phase; phases don't nest."""
        self._restart()
        try:
            yield
        finally:
            self.phases[name] = max(self.phases.get(name, 0), self.counter.peak_bytes())
            self._restart()

    def _restart(self) -> None:
        self._highest = self.peak_bytes
        self.counter.reset()


class CudaCounter:
    """The caching allocator's own counters. Reading them waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reserved = 0

    def now_bytes(self) -> int:
        """torch.cuda.memory_allocated()."""
        return int(torch.cuda.memory_allocated(self.device))

    def peak_bytes(self) -> int:
        """torch.cuda.max_memory_allocated()."""
        return int(torch.cuda.max_memory_allocated(self.device))

    def reset(self) -> None:
        """Forget the peak, after taking note of the reserved one."""
        self._reserved = max(self._reserved, self._max_reserved())
        torch.cuda.reset_peak_memory_stats(self.device)

    def forget(self) -> None:
        """Give cached blocks back to the driver and forget all peaks."""
        torch.cuda.empty_cache()
        self.reset()
        self._reserved = 0

    def more_peaks(self) -> dict[str, int]:
        """torch.cuda.max_memory_reserved() of the whole run."""
        return {"peak_reserved_bytes": max(self._reserved, self._max_reserved())}

    def doubts(self) -> list[str]:
        """Whether the allocator ran out and had to give its cache back."""
        retries = torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)
        if not retries:
            return []
        return [
            f"the allocator had to free its cache {retries} times: the card is nearly full and steps are slower"
        ]

    def _max_reserved(self) -> int:
        return int(torch.cuda.max_memory_reserved(self.device))


class LiveTensors(TorchDispatchMode):  # type: ignore[misc]
    """While entered, counts the bytes of every storage that an operator returns until it is freed.

    What existed before is added by `add`. Buffers that a kernel takes and frees within one operator are not seen
    (torch's profiler, which sees them, gave 0 to 1.6 % more on small Llama steps).
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.log: StepLog | None = None
        self._peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def add(self, values: Iterable[Any]) -> None:
        """Count the storages of what are tensors among these, each once, for as long as they live."""
        for value in values:
            # Not isinstance: it would wake lazy modules among the interpreter's objects.
            if issubclass(type(value), torch.Tensor):
                self._add(value)

    def now_bytes(self) -> int:
        """Bytes of live storages."""
        return self.live_bytes

    def peak_bytes(self) -> int:
        """Bytes of live storages at the highest moment since the last reset."""
        return self._peak_bytes

    def reset(self) -> None:
        """Start the peak anew at what lives now."""
        self._peak_bytes = self.live_bytes

    def forget(self) -> None:
        """The same as `reset`: nothing else is remembered."""
        self.reset()

    def more_peaks(self) -> dict[str, int]:
        """None: the CPU has no caching allocator."""
        return {}

    def doubts(self) -> list[str]:
        """None."""
        return []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        if self.log is not None:
            self.log.add(self.live_bytes)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live_bytes += self._sizes[key]
        self._peak_bytes = max(self._peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


class AllocatedAfterEach(TorchDispatchMode):  # type: ignore[misc]
    """While entered, logs what the caching allocator has allocated after each operator."""

    def __init__(self, device: torch.device, log: StepLog) -> None:
        super().__init__()
        self.device, self.log = device, log

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.log.add(int(torch.cuda.memory_allocated(self.device)))
        return result


def describe_device(device: torch.device) -> dict[str, Any]:
    """What the record says of the device; `gpu_uuid` lets the parent find it in NVML."""
    facts: dict[str, Any] = {"device": device.type, "num_threads": torch.get_num_threads()}
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    return {
        **facts,
        "gpu_name": properties.name,
        "gpu_uuid": str(getattr(properties, "uuid", "")) or None,
        "gpu_total_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
