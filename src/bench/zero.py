"""DeepSpeed's ZeRO ranks: what a run saves, restores and asks of their engine (DeepSpeed 0.19).

DeepSpeed's own checkpoints are pickles. What they hold is small in kind: each rank's flat share of the master weights
with the optimizer's state of it, from which the model's weights follow.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch


class ZeroOptimizer:
    """The optimizer of a ZeRO engine as a run sees it: `state_dict` is this rank's share, in plain tensors."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._is_stage3 = hasattr(inner, "fp32_partitioned_groups_flat")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups with their rates."""
        groups: list[dict[str, Any]] = self.inner.param_groups
        return groups

    @property
    def masters(self) -> list[torch.Tensor]:
        """This rank's flat shares of the weights that the optimizer steps."""
        name = "fp32_partitioned_groups_flat" if self._is_stage3 else "single_partition_of_fp32_groups"
        masters: list[torch.Tensor] = getattr(self.inner, name)
        return masters

    def step(self) -> None:
        """The engine's."""
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Masters, and the inner optimizer's state of each."""
        states = self.inner.optimizer.state
        return {
            "masters": [master.detach() for master in self.masters],
            "states": [dict(states.get(master, {})) for master in self.masters],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them over, and the model's weights from them; every rank must do so. ValueError: of other sizes."""
        states = self.inner.optimizer.state
        saved = state_dict["masters"], state_dict["states"]
        for master, values, state in zip(self.masters, *saved, strict=True):
            if master.shape != values.shape:
                raise ValueError(f"a share has {values.numel()} elements, not {master.numel()}")
            master.data.copy_(values)
            states[master] = {
                name: item.to(master.device if item.ndim else item.device)
                if isinstance(item, torch.Tensor)
                else item
                for name, item in state.items()
            }
        with torch.no_grad():
            self._spread_masters()

    def _spread_masters(self) -> None:
        """What an update does after its step."""
        if not self._is_stage3:
            self.inner.update_lp_params()
            return
        self.inner._partition_all_parameters()
        for group in range(len(self.masters)):
            self.inner._reassign_or_swap_out_partitioned_parameters(group)
        self.inner._post_step(set())


def whole_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """A gradient before the update, gathered; every rank must ask."""
    gradient: torch.Tensor | None = importlib.import_module("deepspeed.utils").safe_get_full_grad(parameter)
    return gradient


def whole_weight(parameter: torch.Tensor) -> torch.Tensor:
    """A weight that stage 3 splits, gathered and copied to the host; every rank must ask."""
    with importlib.import_module("deepspeed").zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True)
