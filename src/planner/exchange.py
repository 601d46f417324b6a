"""What the ranks of a run exchange: the groups of weights that are gathered and of gradients that are reduced.

The groups are those of accelerate 1.15 (utils/fsdp_utils.py, fsdp2_prepare_model): each layer; the embedding; final
norm and head, with the embedding where they are tied; the root holds the rest.
"""

from __future__ import annotations

import functools

from planner import sharding
from planner.inventory import (
    Inventory,
    adapter_width,
    base_tensors,
    norm_width,
    packed_bytes,
    trained_tensors,
    trained_width,
    unquantised_width,
)
from planner.layers import adapter_rank, target_matrices
from planner.methods import find_method
from planner.setup import TrainSetup
from planner.sharding import STRATEGIES, Exchanged, Group
from planner.specs import LayerSpec, ModelSpec
from planner.units import DTYPE_BYTES
from planner.zero_calls import CallRules, module_calls


def gathered_widths(setup: TrainSetup) -> tuple[int, int, int]:
    """Bytes per element of whole weights, norms and adapters, as the layers compute with them.

    FSDP2 gathers in the dtype of mixed precision (MixedPrecisionPolicy.param_dtype) what it keeps in another one.
    """
    if setup.autocast and setup.num_gpus > 1 and STRATEGIES[setup.sharding].reduces_by_group:
        width = DTYPE_BYTES[setup.autocast]
        return width, width, width
    return unquantised_width(setup), norm_width(setup), adapter_width(setup)


def exchanged(setup: TrainSetup, model: ModelSpec, inventory: Inventory, *, is_reentrant: bool) -> Exchanged:
    """The groups of `model` under `setup`, in bytes. `is_reentrant`: how layers would be recomputed."""
    groups = _Groups(setup, model)
    head = 0 if model.head is None else model.head.num_weights + model.head.num_biases
    tied = model.token_embedding_params if model.tied_head else 0
    untied = 0 if model.tied_head else model.token_embedding_params
    layers = [groups.layer(layer) for layer in model.layers]
    return Exchanged(
        ranks=setup.num_gpus,
        layer_bytes=inventory.largest_layer_bytes,
        root_bytes=inventory.root_bytes,
        trained_root_bytes=inventory.root_bytes if groups.trains_base else 0,
        gradients_bytes=inventory.gradients_bytes,
        weights_bytes=inventory.weights_bytes + inventory.adapters_bytes,
        trained_params=inventory.trained_params,
        largest_trained_params=inventory.largest_trained_bytes // trained_width(setup),
        step_bytes=inventory.step_bytes,
        weight_width=DTYPE_BYTES[setup.weights_dtype],
        is_reentrant=is_reentrant and setup.checkpointing == "full",
        layer=Group(max(g.gathered for g in layers), max(g.reduced for g in layers)),
        embedding=groups.of(untied),
        tail=groups.of((0 if tied else head) + tied + model.final_params),
        rest=groups.of(model.embedding_params - model.token_embedding_params),
        is_tied=bool(tied),
        is_offloaded=setup.offload != "none",
        small_bytes=_small_bytes(setup, model),
        first_trained_params=trained_tensors(setup, model)[0].num_elements,
        accumulates=setup.grad_accum_steps > 1,
        passes=functools.partial(module_calls, model, _call_rules(setup)),
        is_cast=(trained_width(setup) if groups.trains_base else unquantised_width(setup)) != groups.weight,
    )


def _call_rules(setup: TrainSetup) -> CallRules:
    return CallRules(
        is_checkpointed=setup.checkpointing == "full",
        trains_base=find_method(setup.method).trains_base,
        targets=setup.targets if setup.uses_adapters else None,
        rank=setup.rank,
        weight_width=unquantised_width(setup),
        adapter_width=adapter_width(setup),
        persistent=sharding.ZERO.persistent,
    )


def _small_bytes(setup: TrainSetup, model: ModelSpec) -> int:
    """Parameters that DeepSpeed's stage 3 never splits again once they are gathered."""
    base = base_tensors(model, unquantised_width(setup))
    tensors = [*base, *(trained_tensors(setup, model) if setup.uses_adapters else ())]
    return sum(
        t.num_elements * t.count * t.width for t in tensors if t.num_elements <= sharding.ZERO.persistent
    )


def largest_layer_gradient(setup: TrainSetup, model: ModelSpec) -> int:
    """Bytes of the largest gradient that a layer makes."""
    if setup.uses_adapters:
        elements = max(t.num_elements for t in trained_tensors(setup, model))
    else:
        matrices = (m for layer in model.layers for m in layer.matrices)
        elements = max(m.num_weights // (1 if m.kind == "parameter" else m.copies) for m in matrices)
    return elements * trained_width(setup)


class _Groups:
    """Bytes of groups of weights while they are whole, and of their gradients while they are reduced.

    Gradients are reduced in the dtype that the layers compute with: a policy's reduce_dtype is its param_dtype
    (accelerate, FullyShardedDataParallelPlugin.set_mixed_precision).
    """

    def __init__(self, setup: TrainSetup, model: ModelSpec) -> None:
        self.setup, self.model = setup, model
        self.trains_base = find_method(setup.method).trains_base
        self.weight, _, self.adapter = gathered_widths(setup)

    def of(self, num_elements: int) -> Group:
        """A group of weights outside the layers."""
        num_bytes = num_elements * self.weight
        return Group(num_bytes, num_bytes if self.trains_base else 0)

    def layer(self, layer: LayerSpec) -> Group:
        """One layer with its adapters; packed weights are gathered as they are stored."""
        if self.trains_base:
            return self.of(layer.num_params)
        quantised = [m for m in layer.matrices if self.setup.quant and m.kind in ("linear", "conv1d")]
        packed = sum(packed_bytes(m.num_weights, self.setup.quant or "") for m in quantised)
        others = layer.num_params - sum(m.num_weights for m in quantised)
        adapters = self.adapter * self._adapter_elements(layer)
        return Group(packed + others * self.weight + adapters, adapters)

    def _adapter_elements(self, layer: LayerSpec) -> int:
        adapted = {matrix.path for _, matrix in target_matrices(self.model, self.setup.targets)}
        return sum(
            m.copies * adapter_rank(m, self.setup.rank) * (m.in_features + m.out_features)
            for m in layer.matrices
            if m.path in adapted
        )
