"""Rates that a machine reaches, by kind of operation: what a roofline is made of.

A machine that was measured has them all from its own file; a card has its datasheet's peaks times the efficiencies
that published runs of its hardware class reached (profiles/calibration/throughput-classes.json).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from planner.errors import DataError, ProfileError
from planner.files import user_data_folder
from planner.index import profiles_dir
from planner.setup import TrainSetup
from planner.specs import GpuProfile, Machine

TABLE = "throughput-classes.json"


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate by the size of one operation: ascending `points` of (size, rate), between which it is interpolated.

    Below the first and above the last point the rate is theirs.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """The rate for an operation of that size; linear in the logarithm of the size between points."""
        points = self.points
        if size <= points[0][0] or len(points) == 1:
            return points[0][1]
        for (low, slow), (high, fast) in itertools.pairwise(points):
            if size <= high:
                return slow + (fast - slow) * math.log(size / low) / math.log(high / low)
        return points[-1][1]


def flat(rate: float) -> Curve:
    """The same rate whatever the size."""
    return Curve(((1.0, rate),))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What one device of a machine reaches.

    `matmul`: FLOP/s of matrix products by the bytes of their elements (2, 4), each by the FLOPs of one product;
    `weight_matmul` of those that make weights' gradients, which read both operands across (as `matmul` where it is empty);
    `attention` of FLOPs inside fused attention kernels by the same bytes, each by the rows' length in tokens; bytes per second that pointwise operations
    (`memory_bytes_per_s`), the optimizer (`optimizer_bytes_per_s`), clipping (`clip_bytes_per_s`, as the optimizer where it is None) and dequantisation (`dequantise_bytes_per_s`) move;
    `launch_s`: host's time for one kernel; `kernel_s`: device's time for a kernel that does nothing; `step_s`: host's
    time per optimizer step beside the kernels. `overlap`: the share of an exchange between devices that costs the
    passes beside it nothing. One direction of one device: `link_bytes_per_s` to the others of its
    machine, `network_bytes_per_s` to other machines, `host_bytes_per_s` to its host's memory; `host_step_bytes_per_s`
    of an optimizer step on the host. None: unknown. `source` says in words where they come from.
    """

    matmul: Mapping[int, Curve]
    attention: Mapping[int, Curve]
    memory_bytes_per_s: float
    optimizer_bytes_per_s: float
    dequantise_bytes_per_s: float
    launch_s: float
    weight_matmul: Mapping[int, Curve] = field(default_factory=dict)
    clip_bytes_per_s: float | None = None
    kernel_s: float = 0.0
    step_s: float = 0.0
    overlap: float = 0.0
    link_bytes_per_s: float | None = None
    network_bytes_per_s: float | None = None
    host_bytes_per_s: float | None = None
    host_step_bytes_per_s: float | None = None
    source: str = ""

    def product(self, width: int, *, of_weight: bool) -> Curve:
        """FLOP/s of matrix products of elements of `width` bytes, by the FLOPs of one."""
        curves = self.weight_matmul if of_weight and self.weight_matmul else self.matmul
        return curves[width]

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {name: _curves_to_json(plain[name]) for name in CURVES}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Rates:
        """Raises KeyError, TypeError or ValueError for anything that isn't such rates."""
        return cls(**{**values, **{name: _curves_from_json(values.get(name, {})) for name in CURVES}})


CURVES = ("matmul", "weight_matmul", "attention")
"""Rates by the bytes of an element, each of them a curve."""


def _curves_to_json(curves: Mapping[int, Curve]) -> dict[str, Any]:
    return {str(width): list(curve.points) for width, curve in curves.items()}


def _curves_from_json(values: Mapping[str, Any]) -> dict[int, Curve]:
    return {
        int(width): Curve(tuple((float(size), float(rate)) for size, rate in points))
        for width, points in values.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Shares of a card's peaks that runs of one hardware class reached, and times that no datasheet gives.

    `name`: the class; `stack`: the kind of stack (`stack_kind`). `tensor`: of the dense peak in matrix products;
    `attention`: of the 16-bit peak; `memory`, `dequantise`: of the memory's bandwidth; `link`: of the link's rate; `overlap`: Rates';
    `network_bytes_per_s`: of one device to other machines, None where no run says it; `launch_s`: host's time for one
    operation of planner.tape. Shares above 1 are possible: cards run above the clock that their datasheet counts
    with, and caches serve part of what a tape counts as moved. `flops_per_byte`: the class' peak over its bandwidth.
    `num_runs` runs of `sources` set them; `spread`: the median size of the logarithm of measured over
    predicted time with them.
    """

    name: str
    stack: str
    tensor: float
    attention: float
    memory: float
    dequantise: float
    link: float
    overlap: float
    launch_s: float
    network_bytes_per_s: float | None
    flops_per_byte: float
    num_runs: int
    spread: float
    sources: tuple[str, ...]
    assumed: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """Where they come from, for people."""
        projects = "one project" if len(self.sources) == 1 else f"{len(self.sources)} projects"
        return f"{self.num_runs} published runs on {self.name} by {projects}"


FULL_RATE = 3.0
"""16-bit tensor FLOP/s over float32 FLOP/s from which a card's tensor cores accumulate in float32 at full rate: 4 on
workstation and server cards of a generation, 2 where it is halved (GeForce)."""

HALF = "half-rate"
"""In the name of a class whose cards have it halved."""

STACK_KINDS = {
    "pretraining": ("llm-foundry", "torchtitan", "fms-fsdp", "nanogpt", "lit-gpt", "languini", "composer"),
    "vendor": ("nemo", "megatron", "deeplearningexamples"),
}
"""Words of a setup's stack that tell stacks made for pretraining, and those that a card's vendor has tuned."""


def stack_kind(stack: str | None) -> str:
    """The kind of stack that a setup names: fine-tuning where nothing says otherwise."""
    words = (stack or "").lower()
    return next(
        (kind for kind, names in STACK_KINDS.items() if any(n in words for n in names)), "fine-tuning"
    )


def class_name(gpu: GpuProfile) -> str:
    """The hardware class of a card: its compute capability, else its architecture; GeForce's halved rate apart."""
    if gpu.compute_capability is None:
        return gpu.architecture
    name = "sm_{}{}".format(*gpu.compute_capability)
    tensor, full = gpu.flops.get("float16"), gpu.flops.get("float32")
    is_halved = tensor is not None and full is not None and tensor / full < FULL_RATE
    return f"{name} {HALF}" if is_halved else name


def rates_of(machine: Machine, setup: TrainSetup) -> Found | None:
    """The rates of one device of a machine for a setup; None where the datasheet lacks a peak that they need.

    A card's are its peaks times the efficiencies of its hardware class for the setup's kind of stack, else of the
    class for another kind, else of the nearest class.
    """
    gpu = machine.gpu
    if machine.is_local and (measured := local_rates(machine_file(gpu))) is not None:
        return Found(measured)
    if not gpu.flops or gpu.bandwidth_bytes_per_s is None:
        return None
    reached = _shipped(class_name(gpu), flops_per_byte(gpu), stack_kind(setup.stack))
    rates = card_rates(gpu, reached, setup.autocast or setup.weights_dtype)
    return None if rates is None else Found(rates, reached, is_own=reached.name == class_name(gpu))


@dataclass(frozen=True, slots=True)
class Found:
    """Rates, the efficiencies behind them (None: the machine was measured), and whether these are of the card's own class."""

    rates: Rates
    reached: Efficiency | None = None
    is_own: bool = True


def machine_file(gpu: GpuProfile) -> Path:
    """Where a device's own rates are kept: {"schema_version": 1, "rates": Rates.to_json()}, one file to a device."""
    # All processors are called cpu; what tells them apart is their model.
    name = gpu.architecture if gpu.backend == "cpu" else gpu.name
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return user_data_folder() / f"machine-rates-{slug}.json"


@functools.cache
def local_rates(path: Path) -> Rates | None:
    """What was measured on a device, from its file; None where nobody has. Raises DataError for a broken file."""
    if not path.is_file():
        return None
    try:
        return Rates.from_json(json.loads(path.read_bytes())["rates"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(str(path), f"not a machine's rates ({error}); delete it") from error


def _efficiency(row: Mapping[str, Any]) -> Efficiency:
    return Efficiency(**{**row, "sources": tuple(row["sources"]), "assumed": tuple(row["assumed"])})


@functools.lru_cache(maxsize=1024)
def _shipped(own: str, ridge: float, kind: str) -> Efficiency:
    return nearest(own, ridge, kind, efficiencies())


def nearest(own: str, ridge: float, kind: str, known: Iterable[Efficiency]) -> Efficiency:
    """The most fitting of at least one for a card of class `own` with `ridge` FLOPs per byte.

    Its own class, then stacks of the same kind, halved rates or not, then FLOPs per byte most alike.
    """

    def unlikeness(reached: Efficiency) -> tuple[bool, bool, bool, bool, float]:
        # What a vendor tuned says little about any other stack.
        is_tuned = reached.stack == "vendor" != kind
        apart = abs(math.log(reached.flops_per_byte / ridge)) if 0 < ridge < math.inf else 0.0
        is_half = own.endswith(HALF) != reached.name.endswith(HALF)
        return is_tuned, reached.name != own, reached.stack != kind, is_half, apart

    return min(known, key=unlikeness)


def flops_per_byte(gpu: GpuProfile) -> float:
    """FLOPs for each byte of memory that a card can do, by its datasheet."""
    peaks = (gpu.flops.get(dtype) for dtype in ("bfloat16", "float16", "float32"))
    return next((peak for peak in peaks if peak), math.inf) / (gpu.bandwidth_bytes_per_s or math.inf)


@functools.cache
def efficiencies() -> tuple[Efficiency, ...]:
    """The shipped table. Raises ProfileError for a broken file."""
    path = profiles_dir() / "calibration" / TABLE
    try:
        return tuple(_efficiency(row) for row in json.loads(path.read_bytes())["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"can't read {path} ({error}): reinstall finefit") from error


OPTIMIZER_SHARE = 0.8
"""Of the memory's bandwidth in an optimizer step, which streams over contiguous tensors. Assumed: no published run
tells it apart (a step over 7e9 parameters is 2 % of a run's time)."""
HOST_LINK_SHARE = 0.5
"""Of PCI Express' rate to the host's memory. Assumed; published runs with offload hide it behind the passes."""
HOST_STEP_BYTES_PER_S = 25.6e9
"""Of an optimizer step in host memory: one channel of DDR4-3200, the least that a server has (JEDEC JESD79-4)."""
BRIDGE_FACTOR = 2.0
"""A link of fewer times PCI Express' rate is a bridge that is bought apart (NVLink of GeForce and workstation cards);
it is not counted on."""


def card_rates(gpu: GpuProfile, reached: Efficiency, dtype: str) -> Rates | None:
    """A card's rates by its class' efficiencies, with `dtype` for 16 bits; None where the datasheet lacks a peak."""
    full = gpu.flops.get("float32")
    tensor = gpu.flops.get(dtype if dtype != "float32" else "float16") or gpu.flops.get("float16") or full
    full = full or tensor
    bandwidth = gpu.bandwidth_bytes_per_s
    if tensor is None or full is None or bandwidth is None:
        return None
    pcie = gpu.pcie_bytes_per_s
    link = _link(gpu)
    return Rates(
        matmul={2: flat(tensor * reached.tensor), 4: flat(full * reached.tensor)},
        attention={2: flat(tensor * reached.attention), 4: flat(tensor * reached.attention)},
        memory_bytes_per_s=bandwidth * reached.memory,
        optimizer_bytes_per_s=bandwidth * OPTIMIZER_SHARE,
        dequantise_bytes_per_s=bandwidth * reached.dequantise,
        launch_s=reached.launch_s,
        overlap=reached.overlap,
        link_bytes_per_s=None if link is None else link * reached.link,
        network_bytes_per_s=reached.network_bytes_per_s,
        host_bytes_per_s=None if pcie is None else pcie * HOST_LINK_SHARE,
        host_step_bytes_per_s=HOST_STEP_BYTES_PER_S,
        source=reached.words,
    )


def _link(gpu: GpuProfile) -> float | None:
    """What a card has to its neighbours for certain."""
    link, pcie = gpu.link_bytes_per_s, gpu.pcie_bytes_per_s
    is_bridge = link is not None and pcie is not None and link < BRIDGE_FACTOR * pcie
    return pcie if link is None or is_bridge else link
