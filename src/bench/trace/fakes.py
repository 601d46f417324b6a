"""A model built on the meta device, with every tensor replaced by an empty fake one.

bitsandbytes' parameters pack themselves with kernels that fake tensors can't run; here their packed form is laid out
by hand, in the sizes that bitsandbytes.functional.quantize_4bit and int8_vectorwise_quant give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BLOCK_4BIT = 64
"""Weights per constant (bitsandbytes' default blocksize for 4-bit weights)."""
BLOCK_NESTED = 256
"""Constants per second-level constant under double quantisation."""


def fill_with_fakes(model: nn.Module) -> None:
    """Replace each parameter and buffer of a model on the meta device by an empty tensor, in place.

    Call it inside FakeTensorMode. What is shared (tied weights) stays shared.
    """
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if not _fill_quantised(module):
            _fill_plain(module, made)


def _fill_plain(module: nn.Module, made: dict[int, torch.Tensor]) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(_empty_like(parameter), parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            if id(buffer) not in made:
                made[id(buffer)] = _empty_like(buffer)
            module._buffers[name] = made[id(buffer)]


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _fill_quantised(module: nn.Module) -> bool:
    """Give a bitsandbytes linear its packed weight; False where the module is none."""
    fill = _PACKED.get(type(module._parameters.get("weight")).__name__)
    if fill is None:
        return False
    bias = module._parameters.get("bias")
    if bias is not None:
        module._parameters["bias"] = nn.Parameter(_empty_like(bias), bias.requires_grad)
    fill(module)
    return True


def _fill_4bit(linear: Any) -> None:
    """Half a byte per weight, a constant per 64 of them: float32, or a byte and a second level of float32."""
    from bitsandbytes.functional import QuantState

    weight = linear.weight
    num_blocks = -(-weight.numel() // BLOCK_4BIT)
    state: dict[str, Any] = {"absmax": torch.empty(num_blocks)}
    if weight.compress_statistics:
        num_nested = -(-num_blocks // BLOCK_NESTED)
        nested = QuantState(
            absmax=torch.empty(num_nested),
            code=torch.empty(256),
            blocksize=BLOCK_NESTED,
            dtype=torch.float32,
        )
        absmax = torch.empty(num_blocks, dtype=torch.uint8)
        state = {"absmax": absmax, "state2": nested, "offset": torch.empty(())}
    storage = linear.quant_storage
    packed = torch.empty((-(-weight.numel() // 2) // storage.itemsize, 1), dtype=storage)
    parameter: Any = nn.Parameter(packed, requires_grad=False)
    parameter.quant_state = QuantState(
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=BLOCK_4BIT,
        quant_type=weight.quant_type,
        dtype=linear.compute_dtype or weight.dtype,
        **state,
    )
    linear.weight = parameter
    # Where sharding replaces the weight, its state is found here.
    linear.quant_state = parameter.quant_state


def hand_over_state(linear: Any) -> None:
    """Give a weight that sharding has gathered its state: as bitsandbytes does, but without making it a Params4bit,
    which no fake tensor can be (bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module)."""
    linear.weight.quant_state = linear.quant_state


def _fill_8bit(linear: Any) -> None:
    """A byte per weight and a float32 constant per row.

    The columns of outliers, whose number depends on the data, are left out.
    """
    out_features, in_features = linear.weight.shape
    parameter: Any = nn.Parameter(
        torch.empty((out_features, in_features), dtype=torch.int8), requires_grad=False
    )
    parameter.CB = parameter.data
    parameter.SCB = torch.empty(out_features)
    linear.weight = parameter
    linear.state.threshold = 0.0


_PACKED = {"Params4bit": _fill_4bit, "Int8Params": _fill_8bit}


def quantised_tensors(model: nn.Module) -> list[torch.Tensor]:
    """The tensors that bitsandbytes keeps beside a model's parameters: constants and code books."""
    found: list[torch.Tensor] = []
    for parameter in model.parameters():
        for holder in (parameter, getattr(parameter, "quant_state", None)):
            found += _tensors_of(holder)
            found += _tensors_of(getattr(holder, "state2", None))
    return found


def _tensors_of(holder: Any) -> list[torch.Tensor]:
    names = ("absmax", "code", "offset", "CB", "SCB")
    values = (getattr(holder, "__dict__", {}).get(name) for name in names)
    return [value for value in values if isinstance(value, torch.Tensor)]
