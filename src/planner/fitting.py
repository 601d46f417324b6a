"""One rung on one machine: the fastest way to run it that fits.

What is left out is left out by law, not by luck. Memory grows with the micro-batch, so the largest that fits is found
by bisection; every concession of a spot lowers the peak or leaves it, so a spot whose leanest tactics don't fit at
micro-batch 1 is done; recomputing is never faster, so it is left where the largest micro-batch of all fits without. Peaks
are kept by what they depend on, so that all cards of one compute capability share them.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import NotModelledError, SetupError
from planner.gains import gains
from planner.lengths import DataLengths
from planner.methods import find_method
from planner.quality import RANKS, Rung
from planner.results import Estimate, Fit, Time
from planner.run_time import time_of_step
from planner.setup import TrainSetup
from planner.sizing import Sizer, Tally
from planner.specs import Machine, ModelSpec
from planner.tactics import Block, Spot, blocks, spots
from planner.units import format_bytes

ENOUGH_TOKENS = 16_384
"""Tokens per micro-batch beyond which a larger one no longer fills a GPU better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """Sequences per optimizer step over all GPUs, their length, and the share of the data's tokens that it cuts off."""

    seq_len: int
    global_batch: int
    is_packed: bool
    lost_share: float | None = 0.0
    is_packing_open: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """The best tactic of a rung on a machine; `estimate` has no words yet."""

    rung: Rung
    machine: Machine
    estimate: Estimate
    shape: BatchShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Misfit:
    """A rung that doesn't run on a machine; `estimate` is the leanest setup's, None where it is refused."""

    rung: Rung
    machine: Machine
    reason: str
    estimate: Estimate | None = None
    error: SetupError | NotModelledError | None = None


class Fitter:
    """Answers rungs and machines for one model and one user's wishes."""

    def __init__(
        self,
        model: ModelSpec,
        wishes: Mapping[str, Any],
        wanted_rank: int,
        lengths: DataLengths | None = None,
    ) -> None:
        """`wishes` are TrainSetup fields that hold for all; `wanted_rank` is tried first, lower ones after it."""
        self.model, self.wishes, self.wanted_rank, self.lengths = model, wishes, wanted_rank, lengths
        self.tally = Tally()
        self.sizer = Sizer(model, self.tally)
        self._times: dict[Hashable, Time | None] = {}

    def best(
        self, rung: Rung, machine: Machine, shapes: Sequence[BatchShape], num_ways: int = 1
    ) -> Fitted | Misfit:
        """The fastest that fits with the first of the shapes that fits at all, or the nearest miss."""
        nearest: Misfit | None = None
        for shape in shapes:
            search = _Family(self, rung, machine, shape)
            try:
                found = search.best()
            except (SetupError, NotModelledError) as error:
                return Misfit(rung=rung, machine=machine, reason=str(error), error=error)
            finally:
                self.tally.setups += search.num_setups
                self.tally.ways += search.num_setups * num_ways
            if found is not None:
                return Fitted(rung=rung, machine=machine, estimate=found, shape=shape)
            nearest = search.misfit()
        assert nearest is not None
        return nearest

    def longest(self, rung: Rung, machine: Machine, lengths: Sequence[int], global_batch: int) -> int:
        """The longest of the ascending lengths that fits in any way, 0 where none does.

        Each of the leanest tactics is asked whether it reaches beyond what is found already, and only then how far.
        """
        is_packed = bool(self.wishes.get("packing"))
        families: dict[int, _Family] = {}

        def fits(tactic: Mapping[str, Any], number: int) -> bool:
            if number not in families:
                shape = BatchShape(seq_len=lengths[number], global_batch=global_batch, is_packed=is_packed)
                families[number] = _Family(self, rung, machine, shape)
            return families[number].fits(tactic)

        found = -1
        first = _Family(
            self,
            rung,
            machine,
            BatchShape(seq_len=lengths[0], global_batch=global_batch, is_packed=is_packed),
        )
        for tactic in first.leanest():
            if found + 1 == len(lengths) or not fits(tactic, found + 1):
                continue
            low, high = found + 1, len(lengths)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(tactic, middle) else (low, middle)
            found = low
        return lengths[found] if found >= 0 else 0

    def time(self, key: Hashable, setup: TrainSetup, machine: Machine) -> Time | None:
        """A step's time on a card."""
        whole = machine.gpu.name, key
        if whole not in self._times:
            self.tally.timed += 1
            self._times[whole] = time_of_step(setup, machine, self.model)
        return self._times[whole]


class _Family:
    """One rung, machine and batch shape."""

    def __init__(self, fitter: Fitter, rung: Rung, machine: Machine, shape: BatchShape) -> None:
        self.fitter, self.rung, self.machine, self.shape = fitter, rung, machine, shape
        wishes = fitter.wishes
        self.fields = {
            "seq_len": shape.seq_len,
            "packing": shape.is_packed,
            "num_gpus": machine.num_gpus,
            **rung.fields(machine.gpu),
        }
        self.blocks = [
            list(blocks(rung.method, machine, spot, wishes, self._gains(spot)))
            for spot in spots(rung.method, machine, wishes)
        ]
        self.key = (rung.name, shape, *self.fields.items(), wishes.get("attention"))
        self.per_rank = max(1, shape.global_batch // machine.num_gpus)
        self.missed: list[Estimate] = []
        self.errors: list[SetupError | NotModelledError] = []

    def _gains(self, spot: Spot) -> dict[str, Any]:
        fitter = self.fitter
        return gains({**self.fields, **spot, **fitter.wishes}, fitter.model, self.machine.gpu, fitter.lengths)

    @property
    def num_setups(self) -> int:
        """Setups that the axes span."""
        tactics = sum(len(block.tactics) for spot in self.blocks for block in spot)
        packings = 1 + self.shape.is_packing_open
        return tactics * len(self._sizes()) * len(self._ranks(all_ranks=True)) * packings

    def best(self) -> Estimate | None:
        """Spots that offload are looked at where none without does: what waits for the host is never faster."""
        found: list[Estimate] = []
        for rank in self._ranks():
            for spot in self.blocks:
                if not (found and spot and spot[0].is_offloaded):
                    found += self._in_spot(spot, rank)
            if found:
                return min(found, key=_seconds)
        if self.errors and not self.missed:
            raise self.errors[0]
        return None

    def leanest(self) -> list[Mapping[str, Any]]:
        """Of every spot, what needs least, the likeliest first."""
        return [tactic for spot in reversed(self.blocks) if spot for tactic in _leanest(spot)]

    def fits(self, tactic: Mapping[str, Any], size: int = 1) -> bool:
        """Whether a tactic fits at a micro-batch and the lowest rank."""
        answer = self._at(tactic, size, self._ranks(all_ranks=True)[0])
        return answer is not None and answer.fit.verdict == "fits"

    def misfit(self) -> Misfit:
        """The nearest miss in words."""
        nearest = max(self.missed, key=lambda e: e.fit.headroom_bytes or 0)
        nearest = self.fitter.sizer.with_odds(nearest, self.machine)
        return Misfit(
            rung=self.rung, machine=self.machine, reason=describe_gap(nearest.fit), estimate=nearest
        )

    def _in_spot(self, spot: Sequence[Block], rank: int) -> Iterator[Estimate]:
        if not spot or not self._leanest_fits(spot):
            return
        for block in spot:
            found = list(self._in_block(block, rank))
            yield from found
            # Coarser states are taken only where the exact ones don't fit at all.
            if found:
                return

    def _in_block(self, block: Block, rank: int) -> Iterator[Estimate]:
        """Recomputing is looked at only where the largest micro-batch of all doesn't fit without."""
        largest = 0
        for _, tactics in itertools.groupby(block.tactics, key=_checkpointing):
            for tactic in tactics:
                found = self._largest(tactic, rank)
                if found is not None:
                    largest = max(largest, found.setup.micro_batch_size)
                    key = self._key(tactic, found.setup.micro_batch_size, rank)
                    yield replace(found, time=self.fitter.time(key, found.setup, self.machine))
            if largest == self._sizes()[-1]:
                return

    def _leanest_fits(self, spot: Sequence[Block]) -> bool:
        """At micro-batch 1, or at the one that needs no accumulation: gradients that wait for others take room."""
        whole = self._sizes()[-1]
        sizes = (1, whole) if whole > 1 and self._accumulation(whole) == 1 else (1,)
        return any(self.fits(tactic, size) for size in sizes for tactic in _leanest(spot))

    def _largest(self, tactic: Mapping[str, Any], rank: int) -> Estimate | None:
        """With the largest micro-batch that fits: the largest of all, which accumulates least, else by bisection."""
        sizes = self._sizes()
        found, low, high = None, -1, len(sizes)
        while high - low > 1:
            # the largest first: where there is room for it, one look is enough
            middle = (low + high) // 2 if high < len(sizes) or low >= 0 else len(sizes) - 1
            answer = self._at(tactic, sizes[middle], rank)
            if answer is not None and answer.fit.verdict == "fits":
                found, low = answer, middle
            else:
                high = middle
        return found

    def _sizes(self) -> list[int]:
        """Micro-batches that divide a rank's share of the batch, as long as they fill a GPU better, or the user's."""
        wishes = self.fitter.wishes
        if "micro_batch_size" in wishes:
            return [wishes["micro_batch_size"]]
        share = max(1, self.per_rank // wishes.get("grad_accum_steps", 1))
        most = max(1, ENOUGH_TOKENS // self.shape.seq_len)
        return [size for size in range(1, min(share, most) + 1) if share % size == 0]

    def _ranks(self, *, all_ranks: bool = False) -> tuple[int, ...]:
        """The wanted rank and then lower ones; ascending and whole with `all_ranks`."""
        wishes = self.fitter.wishes
        if "rank" in wishes or not find_method(self.rung.method).has_rank:
            return (wishes.get("rank", self.fitter.wanted_rank),)
        if all_ranks:
            return RANKS
        return tuple(sorted((r for r in RANKS if r <= self.fitter.wanted_rank), reverse=True))

    def _at(self, tactic: Mapping[str, Any], size: int, rank: int) -> Estimate | None:
        """None where such a setup is refused."""

        def build() -> TrainSetup:
            return self._build(tactic, size, rank)

        try:
            answer = self.fitter.sizer.at(self._key(tactic, size, rank), build, self.machine)
        except (SetupError, NotModelledError) as error:
            self.errors.append(error)
            return None
        if answer.fit.verdict != "fits":
            self.missed.append(answer)
        return answer

    def _key(self, tactic: Mapping[str, Any], size: int, rank: int) -> Hashable:
        return self.key, tuple(tactic.items()), size, rank

    def _build(self, tactic: Mapping[str, Any], size: int, rank: int) -> TrainSetup:
        accumulation = {} if "grad_accum_steps" in tactic else {"grad_accum_steps": self._accumulation(size)}
        values = {**self.fields, "rank": rank, **tactic, **accumulation, **self.fitter.wishes}
        return TrainSetup(**{**values, "micro_batch_size": size})

    def _accumulation(self, size: int) -> int:
        wished: int | None = self.fitter.wishes.get("grad_accum_steps")
        return max(1, self.per_rank // size) if wished is None else wished


def _leanest(spot: Sequence[Block]) -> list[Mapping[str, Any]]:
    """The last block's tactics that recompute; the loss that makes no logits, which is the likeliest to fit, comes first."""
    last = spot[-1].tactics
    return [tactic for tactic in reversed(last) if tactic["checkpointing"] == last[-1]["checkpointing"]]


def _checkpointing(tactic: Mapping[str, Any]) -> str:
    return str(tactic["checkpointing"])


def _seconds(found: Estimate) -> float:
    """For an order by speed per sequence; what isn't known keeps its place behind what is."""
    if found.time is None:
        return float("inf")
    return found.time.step_s / found.setup.global_batch_size


def describe_gap(fit: Fit) -> str:
    """How far a setup is from fitting.

    >>> describe_gap(Fit(verdict="does-not-fit", usable_bytes=2**30, headroom_bytes=-(2**30), probability=1.0))
    'needs 2.0 GiB, 1.0 GiB over'
    """
    headroom, usable = fit.headroom_bytes or 0, fit.usable_bytes or 0
    if headroom < 0:
        return f"needs {format_bytes(usable - headroom)}, {format_bytes(-headroom)} over"
    return f"tight: {fit.probability or 0.0:.0%} chance to run out of memory".replace("%", " %")
