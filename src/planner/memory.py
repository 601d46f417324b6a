"""Memory of a training run per GPU: phases and terms, from what is kept and what each phase adds.

`MemoryModel(setup, model)` does everything that doesn't depend on the batch once; `at(batch, length)` is a
few multiplications. What a block saves comes from planner.blocks and planner.heads, what is always there from
planner.inventory, how ranks share it from planner.sharding; planner.phases puts them together.

Left out, and known: the allocator's exact behaviour (see FRAGMENTATION_SHARE).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from planner.coefficients import load
from planner.contexts import context_bytes
from planner.phases import Step
from planner.rank import Run
from planner.results import PHASES, Memory
from planner.setup import TrainSetup
from planner.shapes import Shape, Shapes, Terms, has_arrays
from planner.sharding import STRATEGIES
from planner.specs import Machine, ModelSpec
from planner.units import DTYPE_BYTES, MIB

CUBLAS_WORKSPACE_BYTES = 8_519_680
"""cuBLAS' default workspace `:4096:2:16:8` (pytorch aten/src/ATen/cuda/CublasHandlePool.cpp), through the
caching allocator; the forward's and autograd's thread have a handle each. Measured: the steady memory of
two published runs exceeds the exact sum of their tensors by 2 x 8,519,680 bytes."""
CUBLAS_WORKSPACE_HOPPER_BYTES = 32 * MIB
"""The same file, for compute capability 9.x, 10.x and 12.x."""
CUBLAS_HANDLES = 2
FLASH_CAPABILITY = (8, 0)
"""The least compute capability that FlashAttention 2 runs on (pytorch's sdp_utils.cpp: sm80 and up)."""
CPU_CONTEXT_BYTES = 410 * MIB
"""Resident set of Python 3.11 with torch 2.13 (CPU build), transformers 5.23 and peft 0.21 imported and a first
step of a tiny model run: 410 MiB; `finefit bench` reports this machine's."""
NCCL_BYTES = 544_000_000
"""One communicator after an all-reduce, 2 ranks on A100 with NVLink (NVIDIA/nccl#964); 688 MB with more."""
NCCL_MANY_RANKS_BYTES = 688_000_000
FRAGMENTATION_SHARE = 0.18
"""Reserved minus allocated, as a share of what a step adds to the steady memory: freed blocks of one phase
that the next can't reuse, because a large block is only split, never moved (CUDACachingAllocator.cpp).
Replaying the traces of three published steps by the allocator's rules gave 16, 19 and 20 %."""
CPU_RETAINED_SHARE = 0.4
"""The same on the CPU, for the resident set: blocks below mmap's threshold, which glibc raises to 32 MiB, stay with
the process when they are freed (mallopt(3), M_MMAP_THRESHOLD). 40 % on a LoRA step of 135 M parameters; with the
threshold pinned at 1 MiB most of it goes."""
FEWEST_IN_ARRAYS = 6
"""Below it, numpy's overhead takes more time than its arithmetic saves."""
SAFETENSORS_COPIES_KEPT = 2
"""Checkpoints kept on disk."""


class MemoryModel:
    """One setup and model; answers any batch and length.

    Batches are asked for in rows of the data, of which some objectives make several sequences each.
    """

    def __init__(
        self,
        setup: TrainSetup,
        model: ModelSpec,
        *,
        on_gpu: bool = True,
        capability: tuple[int, int] | None = None,
    ) -> None:
        """Raises SetupError for targets that match nothing, UnknownNameError for an unknown method."""
        self.setup, self.model, self.on_gpu, self.capability = setup, model, on_gpu, capability
        self.workspace_bytes = _workspace_bytes(capability) if on_gpu else 0
        has_flash = capability is None or capability >= FLASH_CAPABILITY
        self._prepare(has_flash)

    def _prepare(self, has_flash: bool) -> None:
        self.run = Run(
            self.setup,
            self.model,
            on_gpu=self.on_gpu,
            has_flash=has_flash,
            workspace_bytes=self.workspace_bytes,
        )

    def _phases(self, micro_batch_size: int, seq_len: int) -> dict[str, Terms]:
        return Step(self.run, Shape(*self._positions(micro_batch_size, seq_len))).phases()

    def _positions(self, num_rows: int, seq_len: int) -> tuple[int, int]:
        """Those of a micro-batch, and of a sequence, with what a method puts ahead."""
        length = seq_len + self.run.added_tokens
        return num_rows * self.setup.sequences_per_row * length, length

    def at(self, micro_batch_size: int, seq_len: int) -> Memory:
        """Phases and terms for micro-batches of `micro_batch_size` rows of `seq_len` tokens."""
        phases = self._phases(micro_batch_size, seq_len)
        totals = {name: round(sum(terms.values())) for name, terms in phases.items()}
        peak_phase = max(PHASES, key=lambda name: totals[name])
        terms = {name: round(value) for name, value in phases[peak_phase].items()}
        return self._memory(totals, peak_phase, terms, sum(phases["save"].values()))

    def at_many(self, shapes: Sequence[tuple[int, int]]) -> list[Memory]:
        """`at` of each shape, in order; in numpy's arrays where it is installed and enough shapes are alike."""
        found: dict[tuple[int, int], Memory] = {}
        for alike in self._alike(shapes):
            if len(alike) < FEWEST_IN_ARRAYS or not has_arrays():
                found |= {shape: self.at(*shape) for shape in alike}
            else:
                found |= zip(alike, self._in_arrays(alike), strict=True)
        return [found[shape] for shape in shapes]

    def _alike(self, shapes: Iterable[tuple[int, int]]) -> Iterable[list[tuple[int, int]]]:
        kinds: dict[Hashable, list[tuple[int, int]]] = {}
        for rows, length in dict.fromkeys(shapes):
            kinds.setdefault(self.run.kind(*self._positions(rows, length)), []).append((rows, length))
        return kinds.values()

    def _in_arrays(self, alike: Sequence[tuple[int, int]]) -> Iterator[Memory]:
        shapes = Shapes(*zip(*(self._positions(*shape) for shape in alike), strict=True))
        phases = Step(self.run, shapes).phases()
        totals = [shapes.each_rounded(sum(phases[name].values())) for name in PHASES]
        terms = {
            name: [shapes.each_rounded(values) for values in found.values()] for name, found in phases.items()
        }
        steady = shapes.each(sum(phases["save"].values()))
        for i, total in enumerate(zip(*totals, strict=True)):
            peak_phase = PHASES[total.index(max(total))]
            peak = [values[i] for values in terms[peak_phase]]
            yield self._memory(
                dict(zip(PHASES, total, strict=True)),
                peak_phase,
                dict(zip(phases[peak_phase], peak, strict=True)),
                steady[i],
            )

    def _memory(
        self, totals: dict[str, int], peak_phase: str, terms: dict[str, int], steady: float
    ) -> Memory:
        kept_share = FRAGMENTATION_SHARE if self.on_gpu else CPU_RETAINED_SHARE
        terms["fragmentation"] = round(kept_share * (totals[peak_phase] - steady))
        terms["context"] = self._context_bytes
        return Memory(
            phases=totals,
            terms=terms,
            peak_phase=peak_phase,
            host_bytes=self._host_bytes,
            disk_bytes=self._disk_bytes,
        )

    @cached_property
    def _context_bytes(self) -> int:
        if not self.on_gpu:
            return CPU_CONTEXT_BYTES
        if not STRATEGIES[self.setup.sharding].uses_nccl or self.setup.num_gpus == 1:
            return context_bytes(self.capability)
        return context_bytes(self.capability) + (
            NCCL_BYTES if self.setup.num_gpus == 2 else NCCL_MANY_RANKS_BYTES
        )

    @cached_property
    def _host_bytes(self) -> int:
        """Loading needs one copy of the weights per rank; offloaded and paged states stay."""
        inv = self.run.inventory
        load = inv.weights_bytes if self.setup.quant is None else self.model.num_params * 2
        states = inv.host_states_bytes
        if self.setup.offload != "none":
            states += inv.states_bytes + inv.master_bytes + inv.gradients_bytes
        if self.setup.offload == "params+optimizer":
            states += inv.weights_bytes
        return round(load + states)

    @cached_property
    def _disk_bytes(self) -> int:
        """Checkpoints (trained weights and optimizer states) and the final save."""
        inv = self.run.inventory
        trained = inv.gradients_bytes
        checkpoint = trained + inv.states_bytes + inv.host_states_bytes + inv.master_bytes
        return round(SAFETENSORS_COPIES_KEPT * checkpoint + trained)


class TracedMemoryModel(MemoryModel):
    """The same for an architecture without formulas, from coefficients that were traced."""

    def _prepare(self, has_flash: bool) -> None:
        """Raises NotModelledError where this setup wasn't traced."""
        self.coefficients = load(self.model, self.setup, on_gpu=self.on_gpu)

    def _phases(self, micro_batch_size: int, seq_len: int) -> dict[str, Terms]:
        found = self.coefficients.at(micro_batch_size, seq_len)
        phases = {}
        for name, terms in found.items():
            workspace = terms.pop("temporary") + self.workspace_bytes
            phases[name] = {**terms, "workspace": workspace}
        # No command of finefit's resumes several ranks; each would fill tensors that a running step has.
        phases.setdefault("resume", phases["save"])
        return {name: phases[name] for name in PHASES}

    def at_many(self, shapes: Sequence[tuple[int, int]]) -> list[Memory]:
        """See MemoryModel."""
        return [self.at(*shape) for shape in shapes]

    @cached_property
    def _host_bytes(self) -> int:
        """Loading needs one copy of the weights; paged states stay."""
        width = DTYPE_BYTES[self.setup.weights_dtype]
        return round(self.model.num_params * width + self.coefficients.host_states_bytes)

    @cached_property
    def _disk_bytes(self) -> int:
        trained, length = self.coefficients.trained_bytes, self.model.max_positions or 1
        states = self.coefficients.at(1, length)["save"]["optimizer"] + self.coefficients.host_states_bytes
        return round(SAFETENSORS_COPIES_KEPT * (trained + states) + trained)


def machine_facts(machine: Machine) -> dict[str, Any]:
    """What the memory model has to know of a machine."""
    return {"on_gpu": machine.gpu.backend != "cpu", "capability": machine.gpu.compute_capability}


def memory_model(
    setup: TrainSetup, model: ModelSpec, *, on_gpu: bool = True, capability: tuple[int, int] | None = None
) -> MemoryModel:
    """By formulas, or by traced coefficients where there are none. Raises as these do."""
    kind = TracedMemoryModel if model.is_traced else MemoryModel
    return kind(setup, model, on_gpu=on_gpu, capability=capability)


def card_features(*, on_gpu: bool, capability: tuple[int, int] | None) -> Hashable:
    """What of a card its peaks depend on: cards with equal features have equal peaks for every setup."""
    has_flash = capability is None or capability >= FLASH_CAPABILITY
    return on_gpu, has_flash, _workspace_bytes(capability) if on_gpu else 0, context_bytes(capability)


def _workspace_bytes(capability: tuple[int, int] | None) -> int:
    is_hopper = capability is not None and capability[0] in (9, 10, 12)
    return CUBLAS_HANDLES * (CUBLAS_WORKSPACE_HOPPER_BYTES if is_hopper else CUBLAS_WORKSPACE_BYTES)


def estimate_memory(
    setup: TrainSetup, model: ModelSpec, *, on_gpu: bool = True, capability: tuple[int, int] | None = None
) -> Memory:
    """Memory per GPU of one setup; see MemoryModel."""
    owner = memory_model(setup, model, on_gpu=on_gpu, capability=capability)
    return owner.at(setup.micro_batch_size, setup.seq_len)
