"""What a run that has no smaller step left is told: the nearest setup that is predicted to fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from bench.ladder import Shortage, changed_fields
from planner.errors import DoesNotFitError, FinefitError, NotModelledError, SetupError
from planner.setup import TrainSetup
from planner.specs import Machine


def nothing_left(
    setup: TrainSetup, shortage: Shortage, find_machine: Callable[[], Machine]
) -> DoesNotFitError:
    """The error of a ladder that has ended: what was missing, and a plan that would fit where one is known."""
    fitting = fitting_setup(setup, shortage, find_machine)
    missing_bytes = shortage.missing_bytes or 0
    if isinstance(fitting, str):
        return DoesNotFitError(
            f"{shortage}: no smaller step is left, and no plan that would fit is known ({fitting})",
            missing_bytes,
        )
    words = " ".join(f"--set {name}={_word(value)}" for name, value in changed_fields(setup, fitting).items())
    return DoesNotFitError(
        f"{shortage}: no smaller step is left; predicted to fit, in a new folder: {words}", missing_bytes
    )


def _word(value: Any) -> str:
    return {None: "none", True: "true", False: "false"}.get(value, str(value))


def fitting_setup(
    setup: TrainSetup, shortage: Shortage, find_machine: Callable[[], Machine]
) -> TrainSetup | str:
    """The nearest setup that is predicted to need at least the shortage less than this one; else why there is none.

    Predictions are compared with predictions, so that an error that both have cancels.
    """
    from planner.estimate import estimate

    try:
        machine = find_machine()
        needed = estimate(setup, machine).memory
        limit_bytes = needed.device_used_bytes - (shortage.missing_bytes or 1)
        short = replace(machine, free_bytes=min(limit_bytes, machine.free_bytes or limit_bytes))
        return next(_fitting(setup, short), "none of those that finefit knows is small enough")
    except (FinefitError, OSError) as error:
        return str(error)


_KEPT = (
    "objective",
    "model",
    "revision",
    "tokenizer",
    "from_scratch",
    "data",
    "eval_fraction",
    "rank",
    "alpha",
    "dropout",
    "targets",
    "packing",
    "padding_free",
    "attention",
    "stack",
    "epochs",
    "max_steps",
    "num_gpus",
)
"""What the run is about, beside its method and length; the rest is open to the search."""


def _fitting(setup: TrainSetup, machine: Machine) -> Iterator[TrainSetup]:
    """What fits, the least changed first: leaner settings, QLoRA, then shorter rows."""
    from planner.estimate import estimate
    from planner.search import plan

    values = setup.to_dict()
    kept = {name: getattr(setup, name) for name in _KEPT if values.get(name) is not None}
    methods = [setup.method, *(["qlora"] if setup.method == "lora" else [])]
    length = setup.seq_len
    while length:
        for method in methods:
            wishes = {**kept, "method": method, "seq_len": length}
            total = setup.micro_batch_size * setup.grad_accum_steps * setup.num_gpus
            try:
                found = plan(wishes, machine, global_batch=total).estimate.setup
                smaller = setup.with_(**{name: getattr(found, name) for name in _OPEN})
                verdict = estimate(smaller, machine).fit.verdict
            except (DoesNotFitError, SetupError, NotModelledError):
                continue
            if verdict == "fits":
                yield smaller
        length //= 2


_OPEN = (
    "method",
    "quant",
    "kbit_upcast",
    "weights_dtype",
    "autocast",
    "master_weights",
    "optimizer",
    "optimizer_in_backward",
    "max_grad_norm",
    "checkpointing",
    "loss",
    "micro_batch_size",
    "grad_accum_steps",
    "seq_len",
)
"""What is taken over from the plan that was found."""
