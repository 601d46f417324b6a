"""What a run's resumption allocates: bench.checkpoint.load_weights, and the optimizer's own load_state_dict."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from bench.build import trained_parameters
from bench.checkpoint import load_weights
from bench.optim import Steppable, build_optimizer
from bench.step import TrainStep
from bench.trace.tracker import Tracker
from planner.setup import TrainSetup

PHASE = "resume"
_ELSEWHERE = "cuda"
"""Where fake tensors stand for a checkpoint's in host memory: the step's own are on the CPU, and must be copies."""


def trace_resume(
    setup: TrainSetup, step: TrainStep, tracker: Tracker, tensors: AbstractContextManager[Any]
) -> None:
    """Load the states of `step`'s optimizer into a new one, as a run does that takes over a checkpoint.

    `step` can't be used afterwards: its optimizer is gone.
    """
    model, states = step.model, step.optimizer.state_dict()
    with tensors:
        states, weights = _saved(states), _saved(dict(trained_parameters(model)))
    _forget(step)
    with tracker:
        tracker.begin("build")
        optimizer: Steppable = build_optimizer(setup, model)
    with tensors, tracker, warnings.catch_warnings():
        # bitsandbytes copies the states first, and asks fake ones for their address.
        warnings.simplefilter("ignore")
        tracker.begin(PHASE)
        # Something must be allocated for a moment to be seen.
        torch.empty(0)
        load_weights(trained_parameters(model), weights)
        optimizer.load_state_dict(states)
        tracker.begin("end")
    step.optimizer = optimizer


def _saved(tree: Any) -> Any:
    return tree_map_only(torch.Tensor, _elsewhere, tree)


def _elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=_ELSEWHERE)


def _forget(step: TrainStep) -> None:
    """Free the states: hooks of an optimizer that steps in the backward would keep them."""
    optimizer: Any = step.optimizer
    for inner in getattr(optimizer, "optimizers", [getattr(optimizer, "inner", optimizer)]):
        inner.state.clear()
    del step.optimizer
