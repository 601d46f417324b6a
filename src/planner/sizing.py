"""Peaks and verdicts of a search's setups: what cards have in common is computed once.

A peak depends on few features of a card (planner.memory.card_features). A verdict depends on the peak and on what the
card can give, and more to give is never worse: between a card that a setup fits and one that it doesn't, only cards
in between have to be judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from planner.checks import check
from planner.errors import SetupError
from planner.estimate import usable_memory
from planner.memory import card_features, machine_facts, memory_model
from planner.results import Estimate, Fit, Memory
from planner.setup import TrainSetup
from planner.specs import Machine, ModelSpec
from planner.uncertainty import Uncertainty


@dataclass(slots=True)
class Tally:
    """What a search covered: `setups`, of which each was decided; `ways` counts each offer that could run one.

    `sized` peaks were computed and `timed` steps; `shared` peaks were known from another card.
    """

    setups: int = 0
    ways: int = 0
    sized: int = 0
    shared: int = 0
    timed: int = 0


@dataclass(slots=True)
class _Peak:
    """A peak, the middle of what it may need, and between which sizes of card its verdict lies."""

    memory: Memory
    uncertainty: Uncertainty
    middle_bytes: int = 0
    fits_from: float = math.inf
    misses_to: float = -math.inf

    def judge(self, usable_bytes: int) -> Fit:
        """As Uncertainty.judge; without a probability where the verdict follows from another card's."""
        if self.misses_to < usable_bytes < self.fits_from:
            found = self.uncertainty.judge(self.memory, usable_bytes)
            self._learn(usable_bytes, found)
            return found
        available = usable_bytes - self.memory.terms["context"]
        return Fit(
            verdict="fits" if usable_bytes >= self.fits_from else "does-not-fit",
            usable_bytes=available,
            headroom_bytes=available - self.middle_bytes,
            probability=None,
        )

    def _learn(self, usable_bytes: int, found: Fit) -> None:
        self.middle_bytes = (found.usable_bytes or 0) - (found.headroom_bytes or 0)
        if found.verdict == "fits":
            self.fits_from = usable_bytes
        elif found.verdict == "does-not-fit":
            self.misses_to = usable_bytes


class Sizer:
    """Answers setups by a key that stands for all that they depend on but the card."""

    def __init__(self, model: ModelSpec, tally: Tally) -> None:
        self.model, self.tally = model, tally
        self._setups: dict[Hashable, TrainSetup | SetupError] = {}
        self._peaks: dict[Hashable, _Peak] = {}

    def at(self, key: Hashable, build: Callable[[], TrainSetup], machine: Machine) -> Estimate:
        """The setup's memory and verdict, without words and time. Raises SetupError and NotModelledError."""
        setup = self._setup(key, build)
        check(setup, machine, self.model)
        peak = self._peak(key, setup, machine)
        fit = peak.judge(usable_memory(machine)[0])
        if machine.host_bytes is not None and setup.offload != "none":
            fit = _with_host(fit, peak.memory, machine.host_bytes)
        return Estimate(setup=setup, gpu=machine.label, memory=peak.memory, fit=fit, time=None)

    def with_odds(self, found: Estimate, machine: Machine) -> Estimate:
        """The same with its probability, where the verdict came from another card's."""
        if found.fit.probability is not None:
            return found
        uncertainty = Uncertainty(found.setup, on_gpu=machine_facts(machine)["on_gpu"])
        return replace(found, fit=uncertainty.judge(found.memory, usable_memory(machine)[0]))

    def _setup(self, key: Hashable, build: Callable[[], TrainSetup]) -> TrainSetup:
        if key not in self._setups:
            try:
                self._setups[key] = build()
            except SetupError as error:
                self._setups[key] = error
        found = self._setups[key]
        if isinstance(found, SetupError):
            raise found
        return found

    def _peak(self, key: Hashable, setup: TrainSetup, machine: Machine) -> _Peak:
        facts = machine_facts(machine)
        whole = key, card_features(**facts)
        if whole in self._peaks:
            self.tally.shared += 1
            return self._peaks[whole]
        self.tally.sized += 1
        memory = memory_model(setup, self.model, **facts).at(setup.micro_batch_size, setup.seq_len)
        self._peaks[whole] = _Peak(memory, Uncertainty(setup, on_gpu=facts["on_gpu"]))
        return self._peaks[whole]


def _with_host(fit: Fit, memory: Memory, host_bytes: int) -> Fit:
    """What is kept on the host must fit there too."""
    if memory.host_bytes <= host_bytes:
        return fit
    return Fit(
        verdict="does-not-fit",
        usable_bytes=host_bytes,
        headroom_bytes=host_bytes - memory.host_bytes,
        probability=1.0,
    )
