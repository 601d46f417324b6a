"""Key-value caches on fake tensors: what prefix tuning hands its learned keys and values over in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from transformers.cache_utils import DynamicLayer


def _begin_empty(self: Any, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    self.dtype, self.device = key_states.dtype, key_states.device
    self.keys, self.values = (t[..., :0, :].clone() for t in (key_states, value_states))
    self.is_initialized = True


def shaped_caches() -> AbstractContextManager[Any]:
    """Caches begin with no tokens of the right shape, not with a flat empty tensor.

    Joining a fake tensor to a flat empty one corrupts the process' memory in the backward (torch 2.13); both make the
    same tensors.
    """
    return mock.patch.object(DynamicLayer, "lazy_initialization", _begin_empty)
