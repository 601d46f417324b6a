"""`kernels: liger`: Liger's Triton kernels for a family's norms, rotary embedding and gated MLP, put in by its own patches.

The loss isn't among them: `loss: fused` is Liger's.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from bench.build import inner_model
from planner.errors import MissingExtraError, NotModelledError, nearest_names


def import_liger(module: str, asked: str) -> Any:
    """A module of liger_kernel.transformers (the package itself: ""). Raises MissingExtraError, with what asked for it."""
    try:
        return importlib.import_module(f"liger_kernel.transformers.{module}".rstrip("."))
    except ImportError as error:
        raise MissingExtraError(f"train ({asked})", "liger", "liger-kernel") from error


def fuse(model: nn.Module) -> None:
    """Replace the forwards of the model's modules, and its family's rotary embedding in this whole process.

    Raises MissingExtraError without Liger, NotModelledError for a family that it has no patches for.
    """
    patches = import_liger("monkey_patch", "kernels: liger")
    inner: Any = inner_model(model)
    family = inner.config.model_type
    families = patches.MODEL_TYPE_TO_APPLY_LIGER_FN
    if family not in families:
        near = ", ".join(nearest_names(family, families))
        raise NotModelledError(
            f"kernels: Liger has no patches of {family}{f' (nearest: {near})' * bool(near)}; use plain"
        )
    # Options that a family's patches don't have are left out by Liger itself.
    patches._apply_liger_kernel_to_instance(inner, cross_entropy=False, fused_linear_cross_entropy=False)
