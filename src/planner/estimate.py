"""One setup on one machine -> Estimate: the closed form put together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from operator import attrgetter
from typing import Any

from planner.catalog import usable_bytes_or_bound
from planner.checks import check, warnings
from planner.errors import FinefitError
from planner.memory import MemoryModel, TracedMemoryModel, machine_facts, memory_model
from planner.methods import find_method
from planner.recipes import attention_for
from planner.resolve import resolve_model
from planner.results import Estimate, Memory
from planner.setup import PAIRED, TrainSetup
from planner.specs import Machine, ModelSpec
from planner.stack import NEWEST_KNOWN, parse_stack
from planner.timing import Clock
from planner.uncertainty import Uncertainty
from planner.units import format_bytes

NOT_MODELLED = (
    "the allocator's exact fragmentation (a share is assumed)",
    "dropout inside the model itself",
)
NOT_MODELLED_VALUES = (("checkpointing", "selective", "selective checkpointing: counted as none"),)
"""Field, value, and what is left out where a setup has it."""
NOT_MODELLED_SHARDED = {
    "zero3": "which weights ZeRO-3 keeps gathered when the model exceeds its reuse distance: counted high",
    "fsdp1": "FSDP1's communication buffers beyond whole layers",
    "device_map": "what waits between the stages of a naive pipeline",
}
"""Sharding, and what is left out of what its ranks hold for each other."""


def estimate(setup: TrainSetup, machine: Machine, model: ModelSpec | None = None) -> Estimate:
    """Memory, verdict and time of `setup` on `machine`.

    `model` saves resolving `setup.model` again. Raises SetupError for a contradiction with the machine or the
    model, NotModelledError where finefit has no rules; a setup that doesn't fit is an answer, not an error.
    """
    return Estimator(setup, machine, model).at(setup.micro_batch_size, setup.seq_len)


def estimate_many(setups: Iterable[TrainSetup], machine: Machine) -> Iterator[Estimate]:
    """`estimate` of each setup, in order; a model is resolved once for all of them. Raises as `estimate` does."""
    batch = _Batch(machine)
    for setup in setups:
        model = batch.model(setup)
        memory = batch.memory_model(setup, model)
        yield Estimator(setup, machine, model, memory).at(setup.micro_batch_size, setup.seq_len)


def memory_many(setups: Iterable[TrainSetup], machine: Machine) -> Iterator[Memory]:
    """The memory that `estimate` says for each setup, in order, without its verdict, time and checks.

    Raises SetupError and what resolving a model raises.
    """
    batch, todo = _Batch(machine), iter(setups)
    while part := list(islice(todo, PART_OF_A_BATCH)):
        owners = [batch.memory_model(setup, batch.model(setup)) for setup in part]
        asked: dict[MemoryModel, list[tuple[int, int]]] = {}
        for owner, setup in zip(owners, part, strict=True):
            asked.setdefault(owner, []).append((setup.micro_batch_size, setup.seq_len))
        answers = {owner: iter(owner.at_many(shapes)) for owner, shapes in asked.items()}
        yield from (next(answers[owner]) for owner in owners)


PART_OF_A_BATCH = 4096
"""Setups that are looked at together for what they share."""
_MOST_KEPT = 1024
"""Models, and setups without their batches, that a batch of setups remembers."""
_BATCH_FIELDS = ("micro_batch_size", "seq_len")
_decisive = attrgetter(*(f.name for f in fields(TrainSetup) if f.name not in ("model", *_BATCH_FIELDS)))


class _Batch:
    """What the setups of a batch share: models, and everything of their memory but its evaluation."""

    def __init__(self, machine: Machine) -> None:
        self._facts = machine_facts(machine)
        self._models: dict[Hashable, tuple[TrainSetup, ModelSpec]] = {}
        self._owners: dict[Hashable, MemoryModel] = {}

    def model(self, setup: TrainSetup) -> ModelSpec:
        name = setup.model if isinstance(setup.model, str) else id(setup.model)
        key = (name, setup.revision, setup.stack, setup.objective)
        if key not in self._models:
            _make_room(self._models)
            # The setup is kept with it, because another mapping could get the id of one that is gone.
            self._models[key] = setup, resolve(setup)
        return self._models[key][1]

    def memory_model(self, setup: TrainSetup, model: ModelSpec) -> MemoryModel:
        key = (model, _decisive(setup))
        if key not in self._owners:
            _make_room(self._owners)
            self._owners[key] = memory_model(setup, model, **self._facts)
        return self._owners[key]


def _make_room(kept: dict[Hashable, Any]) -> None:
    if len(kept) >= _MOST_KEPT:
        kept.clear()


class Estimator:
    """The same setup at many batch sizes and lengths, with everything else computed once."""

    def __init__(
        self,
        setup: TrainSetup,
        machine: Machine,
        model: ModelSpec | None = None,
        memory: MemoryModel | None = None,
    ) -> None:
        """`memory` is that of the same setup, whatever its batch. Raises as `estimate` does."""
        self.setup, self.machine = setup, machine
        self.model = resolve(setup) if model is None else model
        check(setup, machine, self.model)
        self._memory = memory or memory_model(setup, self.model, **machine_facts(machine))
        self.usable_bytes, self.usable_source = usable_memory(machine)
        self.uncertainty = Uncertainty(setup, on_gpu=machine_facts(machine)["on_gpu"])
        self._clock = Clock(setup, self.model, machine, self._memory)

    def memory(self, micro_batch_size: int, seq_len: int) -> Memory:
        """Peak memory of another batch shape."""
        return self._memory.at(micro_batch_size, seq_len)

    def verdict(self, micro_batch_size: int, seq_len: int) -> str:
        """Whether another batch shape fits."""
        memory = self.memory(micro_batch_size, seq_len)
        return self.uncertainty.judge(memory, self.usable_bytes).verdict

    def at(self, micro_batch_size: int, seq_len: int, *, with_time: bool = True) -> Estimate:
        """The whole answer for another batch shape; without its time, which takes as long as the rest, where nobody asks."""
        setup = self.setup
        if (micro_batch_size, seq_len) != (setup.micro_batch_size, setup.seq_len):
            setup = setup.with_(micro_batch_size=micro_batch_size, seq_len=seq_len)
        memory = self.memory(micro_batch_size, seq_len)
        return Estimate(
            setup=setup,
            gpu=self.machine.label,
            memory=memory,
            fit=self.uncertainty.judge(memory, self.usable_bytes),
            interval=self.uncertainty.interval(memory),
            time=self._clock.at(micro_batch_size, seq_len) if with_time else None,
            assumptions=tuple(self._assumptions()),
            not_modelled=tuple(self._not_modelled()),
            warnings=tuple(warnings(setup, self.model)),
            source="trace" if self.model.is_traced else "analytic",
        )

    def _assumptions(self) -> list[str]:
        usable = f"{self.machine.gpu.name} gives {format_bytes(self.usable_bytes)} ({self.usable_source})"
        words = [
            precision_recipe(self.setup),
            f"stack: {self.setup.stack or NEWEST_KNOWN}",
            usable,
            self.uncertainty.note,
            self._clock.note,
        ]
        if self.setup.objective in PAIRED:
            words.append("the reference is computed before the first step: no second model in memory")
        if self.model.architecture == "encoder-decoder":
            words.append(f"the encoder reads and the decoder writes {self.setup.seq_len} tokens each")
        if isinstance(self._memory, TracedMemoryModel):
            words.append(self._memory.coefficients.describe())
        return words

    def _not_modelled(self) -> list[str]:
        """What the numbers leave out for this setup."""
        setup = self.setup
        found = [what for field, value, what in NOT_MODELLED_VALUES if getattr(setup, field) == value]
        if setup.stack and setup.objective in PAIRED:
            found.append(
                "what a trainer of that stack holds for pairs of answers: counted as finefit's own step"
            )
        sharded = NOT_MODELLED_SHARDED.get(setup.sharding) if setup.num_gpus > 1 else None
        return [*NOT_MODELLED, *found, *([sharded] if sharded else [])]


def resolve(setup: TrainSetup, *, offline: bool = True) -> ModelSpec:
    """The setup's model, with experts as its stack keeps them and the head of its objective."""
    return resolve_model(
        setup.model,
        revision=setup.revision,
        offline=offline,
        experts_as_linears=parse_stack(setup.stack).splits_experts,
        objective=setup.objective,
    )


def open_attention(fields: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    """The attention of a setup whose fields leave it open, where its model can't run the default; else nothing.

    Nothing too for a model that can't be resolved: whoever asks more of it says why.
    """
    if fields.get("attention") is not None or fields.get("stack") is not None:
        return {}
    named = {
        name: fields[name] for name in ("model", "revision", "objective") if fields.get(name) is not None
    }
    try:
        return attention_for(resolve(TrainSetup.from_dict(named)), machine.gpu)
    except FinefitError:
        return {}


def usable_memory(machine: Machine) -> tuple[int, str]:
    """Bytes that a process can have of one card now, and how that is known; the context is part of them."""
    if machine.free_bytes is not None:
        return machine.free_bytes, "free now on this machine"
    return usable_bytes_or_bound(machine.gpu)


def precision_recipe(setup: TrainSetup) -> str:
    """The precision recipe in words.

    >>> precision_recipe(TrainSetup(method="full"))
    'pure bfloat16 weights, gradients and states'
    """
    method = find_method(setup.method)
    if method.trains_base:
        if setup.master_weights == "float32":
            return f"{setup.weights_dtype} weights with a float32 master copy"
        if setup.autocast:
            return f"{setup.weights_dtype} weights, {setup.autocast} autocast"
        return f"pure {setup.weights_dtype} weights, gradients and states"
    base = f"{setup.quant} base" if setup.quant else f"frozen {setup.weights_dtype} base"
    extra = f", {setup.autocast} autocast" if setup.autocast else ""
    return f"{base}, {setup.adapter_dtype} adapters of {method.words(setup)}{extra}"
