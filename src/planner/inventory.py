"""What a setup keeps in memory whatever the batch is: weights, adapters, trained tensors, optimizer states.

All sizes are whole models', before any sharding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from planner.layers import adapted_matrices, adapter_rank, quantised_matrices
from planner.methods import find_method
from planner.optimizers import Optimizer, find_optimizer
from planner.setup import TrainSetup
from planner.sharding import STRATEGIES
from planner.specs import LayerSpec, Matrix, ModelSpec
from planner.stack import casts_back, parse_stack
from planner.units import DTYPE_BYTES, MIB

ABSMAX_BLOCK = 64
"""Weights per quantisation constant (bitsandbytes' default blocksize for 4-bit weights)."""
NESTED_BLOCK = 256
"""Constants per second-level constant under double quantisation (bitsandbytes.functional.quantize_4bit)."""
OWN_SEGMENT_BYTES, SEGMENT_UNIT_BYTES, LEAST_SPLIT_BYTES = 10 * MIB, 2 * MIB, MIB
"""Of CUDA's caching allocator [kMinLargeAlloc, kRoundLarge, kSmallSize]."""
CODEBOOK_BYTES = 16 * 4
NESTED_CODEBOOK_BYTES = 256 * 4


@dataclass(frozen=True, slots=True)
class TrainedTensor:
    """`count` equal parameters of `stack` x rows x columns that train; `width` is their bytes per element."""

    rows: int
    columns: int
    count: int
    width: int
    stack: int = 1

    @property
    def num_elements(self) -> int:
        """Elements of one of them."""
        return self.stack * self.rows * self.columns

    @property
    def factors(self) -> tuple[int, int] | None:
        """Elements of all its matrices' rows and columns, None for a vector."""
        return (self.stack * self.rows, self.stack * self.columns) if self.rows > 1 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """Bytes that are there during the whole run, and what of them trains.

    `host_states_bytes` are paged optimizer states, which live in managed host memory.
    `largest_layer_bytes` and `root_bytes` are the weights that sharded training gathers at once: the largest
    layer's, and everything outside the layers. `constants_bytes` of the weights are the constants of quantised ones,
    which are no parameters and so on every rank. `unsplit_bytes`: see that function, for all whole weights.
    """

    weights_bytes: int
    unsplit_bytes: int
    constants_bytes: int
    adapters_bytes: int
    master_bytes: int
    gradients_bytes: int
    states_bytes: int
    host_states_bytes: int
    step_bytes: int
    largest_trained_bytes: int
    largest_layer_bytes: int
    root_bytes: int
    trained_params: int


def take_inventory(setup: TrainSetup, model: ModelSpec) -> Inventory:
    """Everything that doesn't depend on the batch. Raises SetupError for targets that match nothing."""
    return _take_inventory(_kept(setup), model)


class _Kept(NamedTuple):
    """All of a setup that decides what is kept: setups that agree in it share one inventory."""

    optimizer: str
    in_backward: bool
    has_master: bool
    method: str
    targets: str | tuple[str, ...]
    rank: int
    num_virtual_tokens: int
    trains_base: bool
    trained_width: int
    quant: str | None
    width: int
    is_half: bool


def _kept(setup: TrainSetup) -> _Kept:
    return _Kept(
        optimizer=setup.optimizer,
        in_backward=setup.optimizer_in_backward,
        has_master=setup.master_weights == "float32",
        method=setup.method,
        targets=setup.targets,
        rank=setup.rank,
        num_virtual_tokens=setup.num_virtual_tokens,
        trains_base=find_method(setup.method).trains_base,
        trained_width=trained_width(setup),
        quant=setup.quant,
        width=unquantised_width(setup),
        is_half=setup.weights_dtype == "float16" and not setup.kbit_upcast,
    )


@functools.lru_cache(maxsize=4096)
def _take_inventory(kept: _Kept, model: ModelSpec) -> Inventory:
    optimizer = find_optimizer(kept.optimizer)
    trained = _trained_tensors(kept, model)
    gradients = sum(t.num_elements * t.count * t.width for t in trained)
    has_master = kept.has_master
    # The optimizer steps on what holds the exact value, and keeps its states in that dtype.
    stepped = [replace(t, width=4) for t in trained] if has_master else trained
    states, on_host = _states(optimizer, stepped)
    largest = max(t.num_elements * t.width for t in trained)
    num_trained = sum(t.num_elements * t.count for t in trained)
    return Inventory(
        weights_bytes=_weights(kept, model) + _widened(kept, model) + model.buffer_bytes,
        unsplit_bytes=_unsplit(kept, model),
        constants_bytes=_constants(model, kept.quant) if kept.quant else 0,
        adapters_bytes=_adapters_bytes(kept, model),
        master_bytes=4 * num_trained if has_master else 0,
        gradients_bytes=gradients,
        states_bytes=states,
        host_states_bytes=on_host,
        # Master weights step with float32 gradients, which take the place of the narrower ones.
        step_bytes=max(
            round(optimizer.step_copies * _stepped_bytes(kept, stepped))
            + max(_tensor_steps(optimizer, stepped)),
            # The last gradient in 16 bits, whose float32 copy is there.
            2 * trained[-2].num_elements if has_master else 0,
        )
        + (4 * num_trained - gradients if has_master else 0),
        largest_trained_bytes=largest,
        largest_layer_bytes=max(_layer_bytes(layer, kept.quant, kept.width) for layer in model.layers),
        root_bytes=_root_params(model) * kept.width,
        trained_params=num_trained,
    )


def _tensor_steps(optimizer: Optimizer, stepped: Iterable[TrainedTensor]) -> Iterator[int]:
    """Bytes of each tensor's own step; one in float32 begins while a variable has the update of the one before."""
    update = 0
    for tensor in stepped:
        yield optimizer.tensor_step_bytes(tensor.num_elements, tensor.width) + update
        if tensor.num_elements and optimizer.tensor_copies:
            update = 4 * tensor.num_elements


def _stepped_bytes(kept: _Kept, stepped: Iterable[TrainedTensor]) -> int:
    """Bytes that one call of the optimizer steps on: everything, or one tensor under optimizer_in_backward."""
    sizes = [t.num_elements * t.width for t in stepped]
    if kept.in_backward:
        return max(sizes)
    return sum(size * t.count for size, t in zip(sizes, stepped, strict=True))


def unquantised_width(setup: TrainSetup) -> int:
    """Bytes per element of the weights that are not quantised.

    FSDP1 flattens a layer's parameters into one tensor of one dtype, which undoes the upcast.
    """
    is_undone = setup.sharding == "fsdp1" or casts_back(parse_stack(setup.stack), setup.autocast)
    if setup.quant and setup.kbit_upcast and not is_undone:
        return 4
    return DTYPE_BYTES[setup.weights_dtype]


def norm_width(setup: TrainSetup) -> int:
    """Bytes per element of the norms' weights, which stay upcast where the embeddings don't."""
    is_upcast = setup.quant and setup.kbit_upcast and setup.sharding != "fsdp1"
    return 4 if is_upcast else unquantised_width(setup)


def trained_width(setup: TrainSetup) -> int:
    """Bytes per element of the parameters that train.

    FSDP keeps its shards in float32 under mixed precision and gathers them in 16 bits: accelerate upcasts
    them (accelerate/utils/fsdp_utils.py), and torch's MixedPrecision policy expects it.
    """
    if setup.sharding in ("fsdp", "fsdp1") and setup.autocast:
        return 4
    return adapter_width(setup) if setup.uses_adapters else DTYPE_BYTES[setup.weights_dtype]


def adapter_width(setup: TrainSetup) -> int:
    """Bytes per element of adapters: DeepSpeed casts all of a 16-bit model (runtime/engine.py)."""
    is_cast = STRATEGIES[setup.sharding].casts_adapters and setup.weights_dtype != "float32"
    return DTYPE_BYTES[setup.weights_dtype if is_cast else setup.adapter_dtype]


def trained_tensors(setup: TrainSetup, model: ModelSpec) -> tuple[TrainedTensor, ...]:
    """Every parameter that trains."""
    return _trained_tensors(_kept(setup), model)


def _trained_tensors(kept: _Kept, model: ModelSpec) -> tuple[TrainedTensor, ...]:
    if kept.trains_base:
        return base_tensors(model, kept.trained_width)
    added = _added(kept, model)
    return tuple(tensor for tensor, trains in added if trains)


def _adapters_bytes(kept: _Kept, model: ModelSpec) -> int:
    """All that the method adds, whether it trains or not."""
    if kept.trains_base:
        return 0
    return sum(tensor.num_elements * tensor.count * tensor.width for tensor, _ in _added(kept, model))


def _added(kept: _Kept, model: ModelSpec) -> tuple[tuple[TrainedTensor, bool], ...]:
    tokens = kept.num_virtual_tokens
    return _added_tensors(model, kept.method, kept.targets, kept.rank, tokens, kept.trained_width)


@functools.lru_cache(maxsize=256)
def base_tensors(model: ModelSpec, width: int) -> tuple[TrainedTensor, ...]:
    """Every parameter of the model itself, as if all were kept in `width` bytes per element."""
    return tuple(_iterate_base(model, width))


def _iterate_base(model: ModelSpec, width: int) -> Iterator[TrainedTensor]:
    yield TrainedTensor(model.embedding_params // model.hidden_size, model.hidden_size, 1, width)
    for layer in model.layers:
        for matrix in layer.matrices:
            yield from _matrix_tensors(matrix, layer.count, width)
        yield TrainedTensor(1, layer.norm_params, layer.count, width)
    for matrix in model.outside:
        yield from _matrix_tensors(matrix, 1, width)
    if model.head is not None and not model.tied_head:
        yield from _matrix_tensors(model.head, 1, width)
    if model.final_params:
        yield TrainedTensor(1, model.final_params, 1, width)


def _matrix_tensors(matrix: Matrix, count: int, width: int) -> Iterator[TrainedTensor]:
    # A bare parameter holds all experts, a linear module is one of them.
    stack, number = (matrix.copies, 1) if matrix.kind == "parameter" else (1, matrix.copies)
    yield TrainedTensor(matrix.out_features, matrix.in_features, count * number, width, stack)
    if matrix.bias:
        yield TrainedTensor(1, matrix.out_features, count * matrix.copies, width)


@functools.lru_cache(maxsize=1024)
def _added_tensors(
    model: ModelSpec,
    method: str,
    targets: str | tuple[str, ...],
    rank: int,
    num_virtual_tokens: int,
    width: int,
) -> tuple[tuple[TrainedTensor, bool], ...]:
    """What a method adds to a model, each with whether it trains."""
    own = find_method(method)
    parts = [(part, 1) for part in own.whole(model, num_virtual_tokens)]
    for layer, matrix in adapted_matrices(model, own, targets):
        # All experts' adapters are one, as their weights are one parameter.
        count = layer.count * (1 if matrix.kind == "parameter" else matrix.copies)
        parts += [(part, count) for part in own.parts(matrix, adapter_rank(matrix, rank))]
    return tuple((TrainedTensor(p.rows, p.columns, count, width), p.trains) for p, count in parts)


def _states(optimizer: Optimizer, trained: Iterable[TrainedTensor]) -> tuple[int, int]:
    """Optimizer states on the device and in managed host memory."""
    device = host = 0
    for tensor in trained:
        size = optimizer.state_bytes(tensor.num_elements, tensor.width, tensor.factors)
        paged = optimizer.host_state_bytes(tensor.num_elements, tensor.width)
        device += tensor.count * (size - paged)
        host += tensor.count * paged
    return device, host


def quantised_bytes(num_weights: int, rows: int, quant: str) -> int:
    """Bytes of one quantised matrix: packed weights, constants, code books."""
    return packed_bytes(num_weights, quant) + constant_bytes(num_weights, rows, quant)


def packed_bytes(num_weights: int, quant: str) -> int:
    """Bytes of one quantised matrix' weights alone: 8 bits each, or 4."""
    return num_weights if quant == "int8" else -(-num_weights // 2)


def constant_bytes(num_weights: int, rows: int, quant: str) -> int:
    """Bytes of the constants and code books of one quantised matrix.

    bitsandbytes: one float32 constant per 64 weights of 4 bits; `nf4-double` keeps the constants in 8 bits
    with one float32 per 256 and an offset; int8 keeps one float32 per row.
    """
    if quant == "int8":
        return 4 * rows
    blocks = -(-num_weights // ABSMAX_BLOCK)
    if quant == "nf4-double":
        return CODEBOOK_BYTES + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 + NESTED_CODEBOOK_BYTES
    return CODEBOOK_BYTES + 4 * blocks


@functools.lru_cache(maxsize=256)
def _constants(model: ModelSpec, quant: str) -> int:
    sizes = (
        layer.count * m.copies * constant_bytes(m.num_weights // m.copies, m.out_features, quant)
        for layer, m in quantised_matrices(model)
    )
    return sum(sizes)


def _widened(kept: _Kept, model: ModelSpec) -> int:
    """What float32 matrices among float16 weights take more."""
    if not kept.is_half:
        return 0
    wide = (layer.count * m.num_weights for layer in model.layers for m in layer.matrices if m.wide)
    return (4 - kept.width) * sum(wide)


def unsplit_bytes(num_bytes: int) -> int:
    """What CUDA's caching allocator hands out beyond a tensor that is the first in a segment of its own.

    Segments for 10 MiB and more are multiples of 2 MiB, and a remainder of up to 1 MiB isn't split off
    (c10/cuda/CUDACachingAllocator.cpp, get_allocation_size and should_split). Weights are loaded before there is
    anything cached, so theirs are new. Known error: what comes later (gradients, optimizer states) gets cached blocks as
    they are, which only a replay can tell.

    >>> unsplit_bytes(18944 * 3584 * 2), unsplit_bytes(14336 * 4096 * 2), unsplit_bytes(9 * 2**20)
    (524288, 0, 0)
    """
    rest = -num_bytes % SEGMENT_UNIT_BYTES
    return rest if num_bytes >= OWN_SEGMENT_BYTES and rest <= LEAST_SPLIT_BYTES else 0


def _unsplit(kept: _Kept, model: ModelSpec) -> int:
    return _unsplit_weights(model, None if kept.trains_base else kept.quant, kept.width)


@functools.lru_cache(maxsize=256)
def _unsplit_weights(model: ModelSpec, quant: str | None, width: int) -> int:
    total = sum(t.count * unsplit_bytes(t.num_elements * t.width) for t in base_tensors(model, width))
    if quant is None:
        return total
    for layer, matrix in quantised_matrices(model):
        one = matrix.num_weights // matrix.copies
        change = unsplit_bytes(packed_bytes(one, quant)) - unsplit_bytes(one * width)
        total += layer.count * matrix.copies * change
    return total


def _weights(kept: _Kept, model: ModelSpec) -> int:
    if kept.trains_base:
        return _num_params(model) * kept.trained_width
    if not kept.quant:
        return _num_params(model) * kept.width
    packed, num_packed = _packed(model, kept.quant)
    return packed + (_num_params(model) - num_packed) * kept.width


@functools.lru_cache(maxsize=256)
def _num_params(model: ModelSpec) -> int:
    return model.num_params


@functools.lru_cache(maxsize=256)
def _packed(model: ModelSpec, quant: str) -> tuple[int, int]:
    """Bytes of the quantised matrices, and their elements."""
    packed = num_packed = 0
    for layer, matrix in quantised_matrices(model):
        one = quantised_bytes(matrix.num_weights // matrix.copies, matrix.out_features, quant)
        packed += layer.count * matrix.copies * one
        num_packed += layer.count * matrix.num_weights
    return packed, num_packed


@functools.lru_cache(maxsize=1024)
def _layer_bytes(layer: LayerSpec, quant: str | None, width: int) -> int:
    if not quant:
        return layer.num_params * width
    linears = [m for m in layer.matrices if m.kind != "parameter"]
    packed = sum(m.copies * packed_bytes(m.num_weights // m.copies, quant) for m in linears)
    return packed + (layer.num_params - sum(m.num_weights for m in linears)) * width


@functools.lru_cache(maxsize=256)
def _root_params(model: ModelSpec) -> int:
    return model.num_params - sum(layer.count * layer.num_params for layer in model.layers)
