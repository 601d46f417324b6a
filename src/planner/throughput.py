"""Time of an optimizer step: a roofline over the operations that the step runs.

What each operation computes and moves comes from the tapes that say what it saves (planner.work). Each matrix product
takes the longer of its FLOPs at the machine's rate and its bytes at the memory's; all else takes its bytes. Where the
device has less to do in a pass than the host needs to launch it, the launches are the time. What ranks exchange runs
beside the passes and counts where it is longer (planner.traffic); the optimizer's step follows.

Known simplifications: documents in a packed row attend as if the row were one; selective checkpointing is counted as
none; experts are evenly loaded; nothing is said of the data loader.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from planner.blocks import layer_work
from planner.inventory import Inventory
from planner.linears import Recipe
from planner.optimizers import find_optimizer
from planner.rank import Run
from planner.rates import Rates
from planner.setup import TrainSetup
from planner.sharding import STRATEGIES
from planner.sizes import evaluate
from planner.specs import ModelSpec
from planner.traffic import traffic
from planner.two_stacks import two_stack_work
from planner.work import DEQUANTISED_BYTES, Passes, Work

_layer_work = functools.lru_cache(maxsize=4096)(layer_work)

RESOURCES = ("compute", "memory", "communication", "launch")


@dataclass(slots=True)
class Seconds:
    """Time by what limits it."""

    compute: float = 0.0
    memory: float = 0.0
    communication: float = 0.0
    launch: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.memory + self.communication + self.launch

    def add(self, other: Seconds, times: float = 1.0) -> None:
        """Add another's time, so many times."""
        self.compute += times * other.compute
        self.memory += times * other.memory
        self.communication += times * other.communication
        self.launch += times * other.launch


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step: the passes of all micro-batches, and what follows them."""

    passes: Seconds
    step: Seconds

    @property
    def seconds(self) -> Seconds:
        """Both together."""
        total = replace(self.passes)
        total.add(self.step)
        return total


@dataclass(frozen=True, slots=True)
class _Kind:
    """Equal layers: their work, how many, and which pairs of positions their attention needs."""

    work: Passes
    count: int
    window: int | None = None
    causal: bool = True
    is_layer: bool = False

    def share(self, seq_len: int) -> float:
        """Of all pairs of positions, those that a kernel which skips the others computes."""
        width = min(self.window or seq_len, seq_len)
        if not self.causal:
            return min(1.0, 2 * width / seq_len)
        return (width - width * width / (2 * seq_len)) / seq_len


@functools.lru_cache(maxsize=8192)
def _layer_kinds(model: ModelSpec, recipe: Recipe, masked: tuple[bool, ...]) -> tuple[tuple[_Kind, ...], int]:
    """The kinds of layers, and bytes per element of what they give; the first layer by itself where its input needs no gradient."""
    layers, width = (two_stack_work if model.architecture == "encoder-decoder" else _stack_work)(
        model, recipe, masked
    )
    counts: dict[int, tuple[int, Passes, int]] = {}
    for number, work in layers:
        count = counts.get(id(work), (0, work, number))[0]
        counts[id(work)] = count + 1, work, number
    found = [
        _Kind(work, count, model.layers[number].window, model.layers[number].causal, is_layer=True)
        for count, work, number in counts.values()
    ]
    return tuple(found), width


def _stack_work(
    model: ModelSpec, recipe: Recipe, masked: tuple[bool, ...]
) -> tuple[list[tuple[int, Passes]], int]:
    """Each layer's kind and work in order, and the width of what the last one gives."""
    is_frozen = not (recipe.trains_base or recipe.has_first_grad)
    found: list[tuple[int, Passes]] = []
    width = recipe.stream
    for position, number in enumerate(model.sequence):
        own = replace(recipe, is_masked=masked[number])
        alike = replace(model.layers[number], count=1)
        is_first = is_frozen and position == 0
        work = _layer_work(alike, model.hidden_size, own, width=width, is_first=is_first)
        found.append((number, work))
        width = work.output_width
    return found, width


class TimeModel:
    """One setup and model on one machine's rates; answers any batch and length."""

    def __init__(self, run: Run, rates: Rates) -> None:
        """`run` is that of the memory model: the same operations take room and time."""
        self.run, self.rates = run, rates
        self.setup, self.model = run.setup, run.model
        self._traffic = traffic(run.setup, run.inventory)
        self._is_checkpointed = run.setup.checkpointing == "full"

    @property
    def unknown(self) -> str | None:
        """A rate that the setup needs and nobody has measured, in words; None where all are known."""
        for name, is_needed in (
            ("network_bytes_per_s", self.setup.num_nodes > 1),
            ("link_bytes_per_s", self.setup.num_gpus > 1 and self.setup.sharding != "device_map"),
            ("host_bytes_per_s", self.setup.offload != "none"),
            ("host_step_bytes_per_s", self.setup.offload != "none"),
        ):
            if is_needed and getattr(self.rates, name) is None:
                return name.removesuffix("_bytes_per_s").replace("_", " ")
        return None

    def at(self, micro_batch_size: int, seq_len: int) -> StepTime:
        """The time of a step with micro-batches of that shape."""
        length = seq_len + self.run.added_tokens
        tokens = micro_batch_size * self.setup.sequences_per_row * length
        forward, backward = self._passes(tokens, length)
        sent, count = self._traffic, self.setup.grad_accum_steps
        passes = Seconds()
        passes.add(self._beside(forward, sent.forward_bytes), count)
        passes.add(self._beside(backward, sent.backward_bytes), count - 1)
        passes.add(self._beside(backward, sent.backward_bytes + sent.last_backward_bytes))
        passes.memory += (count - 1) * self._accumulation()
        return StepTime(passes, self._step())

    def _passes(self, tokens: int, seq_len: int) -> tuple[Seconds, Seconds]:
        """One micro-batch's forward with the loss, and its backward with what is computed again."""
        forward, backward = Seconds(), Seconds()
        launches = [0, 0]
        for kind in self._kinds(tokens, seq_len):
            share = kind.share(seq_len)
            again = [(backward, 1, kind.work.again)] if self._is_checkpointed and kind.is_layer else []
            for total, number, work in (
                (forward, 0, kind.work.forward),
                *again,
                (backward, 1, kind.work.backward),
            ):
                total.add(self._seconds(work, tokens, seq_len, share), kind.count)
                launches[number] += kind.count * work.num_launches
        for total, number in ((forward, 0), (backward, 1)):
            total.memory += self._embedding(tokens, is_backward=number == 1)
            total.launch = max(0.0, launches[number] * self.rates.launch_s - total.total)
        return forward, backward

    def _seconds(self, work: Work, tokens: int, seq_len: int, share: float) -> Seconds:
        """The device's time for some work."""
        rates = self.rates
        found = Seconds()
        for product in work.matmuls:
            flops = evaluate(product.flops, tokens, seq_len)
            computing = flops / rates.product(product.width, of_weight=product.of_weight).at(flops)
            moving = evaluate(product.moved, tokens, seq_len) / rates.memory_bytes_per_s
            if computing >= moving:
                found.compute += product.count * computing
            else:
                found.memory += product.count * moving
        pairs = evaluate(work.attention, tokens, seq_len) + share * evaluate(work.skipping, tokens, seq_len)
        found.compute += pairs / rates.attention[self.run.recipe.compute].at(seq_len)
        found.memory += evaluate(work.moved, tokens, seq_len) / rates.memory_bytes_per_s
        found.memory += work.num_dequantised / (rates.dequantise_bytes_per_s / DEQUANTISED_BYTES)
        found.memory += work.num_launches * rates.kernel_s
        return found

    def _kinds(self, tokens: int, seq_len: int) -> tuple[_Kind, ...]:
        run = self.run
        own = run.recipe_for(tokens, seq_len)
        layers, width = _layer_kinds(self.model, own, run.masked(seq_len))
        return (*layers, _Kind(run.head_work(tokens, width), 1))

    def _embedding(self, tokens: int, *, is_backward: bool) -> float:
        """Rows are looked up; a dense gradient is filled and added to."""
        rows = 2.0 * tokens * self.model.hidden_size * self.run.recipe.stream
        dense = self.model.embedding_params * self.run.recipe.weight if self.run.recipe.trains_base else 0
        moved = (rows + 2.0 * dense) * (dense > 0) if is_backward else rows
        return moved / self.rates.memory_bytes_per_s

    def _beside(self, work: Seconds, sent_bytes: float) -> Seconds:
        """A pass beside which ranks exchange `sent_bytes` and weights come from the host.

        What is exchanged while nothing else runs counts whole; the rest takes from the pass what doesn't overlap.
        """
        sending = self._sending(sent_bytes)
        hidden = work.total * (1 - 1 / max(1, self.model.num_layers))
        exposed = max(sending - hidden, (1 - self.rates.overlap) * sending)
        fetching = _per(self._traffic.host_pass_bytes, self.rates.host_bytes_per_s)
        found = replace(work)
        found.communication += max(exposed, fetching - hidden, 0.0)
        return found

    def _sending(self, num_bytes: float) -> float:
        """Seconds for an exchange between ranks."""
        rates = self.rates
        return _per(
            num_bytes, rates.network_bytes_per_s if self.setup.num_nodes > 1 else rates.link_bytes_per_s
        )

    def _accumulation(self) -> float:
        """Gradients of a micro-batch after the first are added to those that are there."""
        return 3.0 * self.run.inventory.gradients_bytes / self.rates.memory_bytes_per_s

    def _step(self) -> Seconds:
        """Clipping, the optimizer's step, and what ranks exchange after the backward."""
        setup, found = self.setup, Seconds()
        found.communication += self._sending(self._traffic.step_bytes)
        found.launch += self.rates.step_s
        if self._traffic.stepped_bytes:
            found.communication += _per(self._traffic.host_step_bytes, self.rates.host_bytes_per_s)
            found.memory += _per(self._traffic.stepped_bytes, self.rates.host_step_bytes_per_s)
            return found
        rates, inventory = self.rates, self.run.inventory
        seconds = _stepped_bytes(setup, inventory) / rates.optimizer_bytes_per_s
        if setup.max_grad_norm is not None and not setup.optimizer_in_backward:
            # Gradients are read for their norm, then read and written.
            seconds += (
                3.0 * inventory.gradients_bytes / (rates.clip_bytes_per_s or rates.optimizer_bytes_per_s)
            )
        how = STRATEGIES[setup.sharding]
        is_shared = how.shards_optimizer or how.splits_layers
        found.memory += seconds / (setup.num_gpus if is_shared else 1)
        return found


def _per(num_bytes: float, rate: float | None) -> float:
    """Seconds at a rate, which is only needed where there are bytes."""
    if not num_bytes:
        return 0.0
    assert rate is not None, "callers look at `unknown` first"
    return num_bytes / rate


def _stepped_bytes(setup: TrainSetup, inventory: Inventory) -> float:
    """What an optimizer step moves: gradients and states read, parameters and states written, and each pass of a foreach step."""
    optimizer = find_optimizer(setup.optimizer)
    stepped = inventory.master_bytes or inventory.gradients_bytes
    if optimizer.num_accesses:
        return float(optimizer.num_accesses * stepped)
    states = inventory.states_bytes + inventory.host_states_bytes
    return 3.0 * stepped + 2.0 * states
