"""The real NVIDIA driver through pynvml (package nvidia-ml-py): no torch, no CUDA context."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from bench.nvml import LOST, CardLoad, CardMemory, CardProcess, Handle, NvmlQueryError, throttle_reasons


class Pynvml:
    """`Nvml` by pynvml; `module` stands in for the package in tests.

    Asks for the versioned functions by name, newest first, since an older driver lacks the newer ones.
    """

    def __init__(self, module: ModuleType | Any | None = None) -> None:
        self._module = module

    def open(self) -> None:
        """Load and initialise the library; reason "ModuleMissing" where the package isn't installed."""
        if self._module is None:
            try:
                import pynvml
            except ImportError as error:
                raise NvmlQueryError("ModuleMissing", str(error)) from error
            self._module = pynvml
        self._call(("nvmlInit",))

    def close(self) -> None:
        """Release the library."""
        self._call(("nvmlShutdown",))

    def driver_version(self) -> str:
        """See `Nvml`."""
        return _text(self._call(("nvmlSystemGetDriverVersion",)))

    def cuda_version(self) -> tuple[int, int]:
        """See `Nvml`; NVML gives 1000 × major + 10 × minor."""
        number = self._call(("nvmlSystemGetCudaDriverVersion_v2", "nvmlSystemGetCudaDriverVersion"))
        return number // 1000, number % 1000 // 10

    def num_devices(self) -> int:
        """See `Nvml`."""
        return int(self._call(("nvmlDeviceGetCount",)))

    def device(self, index: int) -> Handle:
        """See `Nvml`."""
        return self._call(("nvmlDeviceGetHandleByIndex",), index)

    def name(self, handle: Handle) -> str:
        """See `Nvml`."""
        return _text(self._call(("nvmlDeviceGetName",), handle))

    def uuid(self, handle: Handle) -> str:
        """See `Nvml`."""
        return _text(self._call(("nvmlDeviceGetUUID",), handle))

    def compute_capability(self, handle: Handle) -> tuple[int, int]:
        """See `Nvml`."""
        major, minor = self._call(("nvmlDeviceGetCudaComputeCapability",), handle)
        return int(major), int(minor)

    def memory(self, handle: Handle) -> CardMemory:
        """See `Nvml`; the second version of the query tells the driver's own share apart."""
        try:
            info = self._call(("nvmlDeviceGetMemoryInfo",), handle, self._module.nvmlMemory_v2)  # type: ignore[union-attr]
        except NvmlQueryError as error:
            if error.reason not in ("FunctionNotFound", "ArgumentVersionMismatch", "InvalidArgument"):
                raise
            info = self._call(("nvmlDeviceGetMemoryInfo",), handle)
            return CardMemory(total_bytes=int(info.total), free_bytes=int(info.free))
        return CardMemory(
            total_bytes=int(info.total), free_bytes=int(info.free), reserved_bytes=int(info.reserved)
        )

    def is_ecc_on(self, handle: Handle) -> bool:
        """See `Nvml`."""
        return bool(self._call(("nvmlDeviceGetCurrentEccMode",), handle))

    def mig_handles(self, handle: Handle) -> tuple[Handle, ...] | None:
        """See `Nvml`; an empty slot of the table answers NotFound."""
        current, _ = self._call(("nvmlDeviceGetMigMode",), handle)
        if not current:
            return None
        found = []
        for index in range(self._call(("nvmlDeviceGetMaxMigDeviceCount",), handle)):
            try:
                found.append(self._call(("nvmlDeviceGetMigDeviceHandleByIndex",), handle, index))
            except NvmlQueryError as error:
                if error.reason != "NotFound":
                    raise
        return tuple(found)

    def processes(self, handle: Handle) -> tuple[CardProcess, ...]:
        """See `Nvml`; a process that computes and draws is listed once, with its larger figure."""
        by_pid: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics"):
            names = tuple(f"nvmlDeviceGet{kind}RunningProcesses{version}" for version in ("_v3", "_v2"))
            for process in self._call(names, handle):
                known = by_pid.get(process.pid)
                used = process.usedGpuMemory
                by_pid[process.pid] = used if known is None else max(known, used or 0)
        return tuple(CardProcess(pid=pid, used_bytes=used) for pid, used in sorted(by_pid.items()))

    def load(self, handle: Handle) -> CardLoad:
        """See `Nvml`; each figure that the card lacks is None. Raises only when the card is lost."""
        module = self._module
        assert module is not None
        temperature = self._optional(("nvmlDeviceGetTemperature",), handle, module.NVML_TEMPERATURE_GPU)
        power = self._optional(("nvmlDeviceGetPowerUsage",), handle)
        limit = self._optional(("nvmlDeviceGetEnforcedPowerLimit",), handle)
        clock = self._optional(("nvmlDeviceGetClockInfo",), handle, module.NVML_CLOCK_SM)
        top = self._optional(("nvmlDeviceGetMaxClockInfo",), handle, module.NVML_CLOCK_SM)
        names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        return CardLoad(
            temperature_c=temperature,
            power_w=_scaled(power, 1e-3),
            power_limit_w=_scaled(limit, 1e-3),
            clock_hz=_scaled(clock, 1e6),
            max_clock_hz=_scaled(top, 1e6),
            throttling=throttle_reasons(self._optional(names, handle) or 0),
        )

    def _optional(self, names: tuple[str, ...], *arguments: Any) -> Any:
        try:
            return self._call(names, *arguments)
        except NvmlQueryError as error:
            if error.reason in LOST:
                raise
            return None

    def _call(self, names: tuple[str, ...], *arguments: Any) -> Any:
        """The first of `names` that package and driver both have; NVML's errors become NvmlQueryError."""
        module = self._module
        assert module is not None
        last = NvmlQueryError("FunctionNotFound")
        for name in names:
            function = getattr(module, name, None)
            if function is None:
                continue
            try:
                return function(*arguments)
            except module.NVMLError as error:
                reason = type(error).__name__.removeprefix("NVMLError_")
                last = NvmlQueryError(reason, str(error))
                if reason != "FunctionNotFound":
                    break
            except module.NVMLLibraryMismatchError as error:
                last = NvmlQueryError("FunctionNotFound", str(error))
        raise last


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
