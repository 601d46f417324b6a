"""Optimizers: one entry each, with the bytes of their states, of their step, and what torch and Trainer call them.

State and step sizes are per trained element of the dtype in which the parameter is kept.
Sources: torch.optim's `_multi_tensor_*` functions (which temporaries a foreach step makes) and
bitsandbytes.optim.optimizer (8-bit states: one byte each plus a float32 absmax per 256 elements;
tensors below 4096 elements keep float32 states; paged states live in managed memory from 1e5 elements up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.errors import UnknownNameError

BNB_MIN_8BIT_ELEMENTS = 4096
BNB_PAGED_MIN_ELEMENTS = 100_000
BNB_BLOCK_ELEMENTS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """What an optimizer keeps and needs per trained element.

    `num_states`: tensors of the parameter's size that it keeps (AdamW: 2, SGD without momentum: 0).
    `state_bits`: 0 for the parameter's own dtype, 32 for float32 whatever the parameter is, 8 for bitsandbytes'
    block-wise states.
    `step_copies`: copies of all trained parameters that one step makes at its peak (foreach AdamW: the square
    root of the second moment); 0 for fused and per-tensor steps.
    `tensor_copies`: float32 tensors of one parameter's size that a step on it makes at its peak, where the optimizer
    takes one parameter at a time and computes in float32; a 16-bit parameter and its gradient are cast besides.
    `num_accesses`: tensors of the trained parameters' size that all kernels of a step read and write, where it has several
    (0: one kernel reads parameters, gradients and states and writes all but the gradients).
    `is_factored`: second moments of a matrix are a row and a column (Adafactor).
    `factory` is the class's dotted path, `kwargs` what it is given besides rate and decay;
    `hf_name` is Trainer's `optim`, None where Trainer has none.
    """

    name: str
    summary: str
    num_states: int
    factory: str
    hf_name: str | None
    state_bits: int = 0
    step_copies: float = 0.0
    tensor_copies: int = 0
    num_accesses: int = 0
    is_factored: bool = False
    is_paged: bool = False
    source: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def state_bytes(
        self, num_elements: int, param_bytes: int, largest_dims: tuple[int, int] | None = None
    ) -> int:
        """Bytes of one parameter tensor's states.

        `largest_dims` are a matrix's rows and columns, needed by factored optimizers only.
        """
        if self.is_factored:
            return 4 * (sum(largest_dims) if largest_dims else num_elements)
        if self._has_8bit_states(num_elements):
            return self.num_states * num_elements + self._constants_bytes(num_elements)
        bytes_each = 4 if self.state_bits else param_bytes
        return self.num_states * num_elements * bytes_each

    def tensor_step_bytes(self, num_elements: int, param_bytes: int) -> int:
        """Bytes that a step on one parameter takes for a moment, where parameters are stepped one by one."""
        casts = 2 if self.tensor_copies and param_bytes < 4 else 0
        return 4 * num_elements * (self.tensor_copies + casts)

    def is_on_host(self, num_elements: int) -> bool:
        """Whether a tensor's states live in managed memory that the allocator doesn't see."""
        return self.is_paged and num_elements >= BNB_PAGED_MIN_ELEMENTS

    def host_state_bytes(self, num_elements: int, param_bytes: int) -> int:
        """What of `state_bytes` is in managed memory: all but the constants of 8-bit states."""
        if not self.is_on_host(num_elements):
            return 0
        return self.state_bytes(num_elements, param_bytes) - self._constants_bytes(num_elements)

    def _has_8bit_states(self, num_elements: int) -> bool:
        return self.state_bits == 8 and num_elements >= BNB_MIN_8BIT_ELEMENTS

    def _constants_bytes(self, num_elements: int) -> int:
        """One float32 per block and 8-bit state."""
        if not self._has_8bit_states(num_elements):
            return 0
        return self.num_states * 4 * -(-num_elements // BNB_BLOCK_ELEMENTS)


_BNB = "bitsandbytes.optim"

OPTIMIZERS: dict[str, Optimizer] = {
    o.name: o
    for o in (
        Optimizer(
            name="adamw",
            summary="AdamW, all tensors at once (foreach)",
            num_states=2,
            step_copies=1.0,
            num_accesses=18,
            factory="torch.optim.AdamW",
            hf_name="adamw_torch",
            kwargs={"foreach": True},
            source="torch.optim.adamw: _foreach_sqrt(exp_avg_sq) is one more copy of the trained parameters; "
            "_multi_tensor_adamw: lerp 3, mul 2, addcmul 3, sqrt 2, div 2, add 2, addcdiv 4",
        ),
        Optimizer(
            name="adamw-fused",
            summary="AdamW in one fused kernel, no temporaries",
            num_states=2,
            factory="torch.optim.AdamW",
            hf_name="adamw_torch_fused",
            kwargs={"fused": True},
            source="torch.optim.adamw: _fused_adamw_ works in place",
        ),
        Optimizer(
            name="adamw-8bit",
            summary="AdamW with 8-bit states (bitsandbytes)",
            num_states=2,
            state_bits=8,
            factory=f"{_BNB}.AdamW8bit",
            hf_name="adamw_bnb_8bit",
            source="bitsandbytes.optim.AdamW8bit: 2 x (1 byte + 4/256)",
        ),
        Optimizer(
            name="paged-adamw-8bit",
            summary="AdamW with 8-bit states that page to host memory (bitsandbytes)",
            num_states=2,
            state_bits=8,
            is_paged=True,
            factory=f"{_BNB}.PagedAdamW8bit",
            hf_name="paged_adamw_8bit",
            source="bitsandbytes.optim.PagedAdamW8bit: managed memory from 1e5 elements up",
        ),
        Optimizer(
            name="paged-adamw",
            summary="AdamW with float32 states that page to host memory (bitsandbytes)",
            num_states=2,
            state_bits=32,
            is_paged=True,
            factory=f"{_BNB}.PagedAdamW32bit",
            hf_name="paged_adamw_32bit",
            source="bitsandbytes.optim.PagedAdamW32bit: managed memory from 1e5 elements up",
        ),
        Optimizer(
            name="adafactor",
            summary="Adafactor: factored second moments",
            num_states=1,
            is_factored=True,
            tensor_copies=2,
            factory="transformers.optimization.Adafactor",
            hf_name="adafactor",
            kwargs={"scale_parameter": False, "relative_step": False},
            source="transformers.optimization.Adafactor: rows + columns in float32; one tensor at a time in float32, "
            "where the new update is made beside the squared gradient",
        ),
        Optimizer(
            name="sgd",
            summary="SGD without momentum",
            num_states=0,
            factory="torch.optim.SGD",
            hf_name="sgd",
            source="torch.optim.SGD",
        ),
        Optimizer(
            name="lion-8bit",
            summary="Lion with an 8-bit momentum (bitsandbytes)",
            num_states=1,
            state_bits=8,
            factory=f"{_BNB}.Lion8bit",
            hf_name="lion_8bit",
            source="bitsandbytes.optim.Lion8bit: 1 byte + 4/256",
        ),
        Optimizer(
            name="lion",
            summary="Lion (bitsandbytes)",
            num_states=1,
            state_bits=32,
            factory=f"{_BNB}.Lion",
            hf_name="lion_32bit",
            source="bitsandbytes.optim.Lion: one float32 momentum",
        ),
    )
}


def find_optimizer(name: str) -> Optimizer:
    """The optimizer of that name; UnknownNameError with the nearest names otherwise."""
    if name not in OPTIMIZERS:
        raise UnknownNameError("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]
