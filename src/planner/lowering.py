"""From a TrainSetup and its stack to what planner.blocks and planner.heads need: widths, modules, treatment of logits."""

from __future__ import annotations

import functools

from planner.exchange import gathered_widths
from planner.families import takes_attention
from planner.heads import LossBytes
from planner.inventory import adapter_width
from planner.layers import adapted_matrices, adapter_rank
from planner.linears import Recipe
from planner.methods import find_method
from planner.optimizers import find_optimizer
from planner.setup import PAIRED, TrainSetup
from planner.sharding import STRATEGIES
from planner.specs import ModelSpec
from planner.stack import OWN_LOSS_FAMILIES, Stack, repeats_groups
from planner.tape import FULL_WIDTH
from planner.units import DTYPE_BYTES


def block_recipe(
    setup: TrainSetup, model: ModelSpec, stack: Stack, *, on_gpu: bool, has_flash: bool
) -> Recipe:
    """The widths and modules that decide what a block saves."""
    method = find_method(setup.method)
    weight, norm, adapter = gathered_widths(setup)
    compute = DTYPE_BYTES[setup.autocast or setup.weights_dtype]
    is_own = setup.runs_own_kernels and not setup.compile
    joins = setup.joins_rows and setup.attention == "sdpa"
    return Recipe(
        weight=weight,
        norm=norm,
        compute=compute,
        # Autocast's norm of the embeddings is float32.
        stream=FULL_WIDTH if model.norms_embeddings and setup.autocast else weight,
        mask=weight,
        copies_weights=not (STRATEGIES[setup.sharding].casts_gathered and setup.num_gpus > 1),
        adapter=adapter,
        adapted=_adapted(model, setup.method, setup.targets, setup.rank),
        adapt=method.adapt,
        trains_base=method.trains_base,
        autocast=setup.autocast is not None,
        quantised_bits=_QUANTISED_BITS[setup.quant],
        is_float16="float16" in (setup.autocast or setup.weights_dtype,),
        dropout=setup.dropout > 0,
        attention=setup.attention,
        fused=(setup.kernels != "plain" and not is_own) or setup.compile,
        fused_mlp=setup.compile or (setup.kernels == "liger" and _is_ligers_own(setup, stack)),
        fused_adapters=setup.kernels != "plain" and not is_own and setup.quant is not None,
        own=is_own,
        own_adapters=is_own and _fuses_adapters(setup, weight, adapter),
        own_attention=joins or (is_own and setup.attention == "sdpa" and takes_attention(model)),
        trains_first=not method.frozen,
        on_gpu=on_gpu,
        has_flash=has_flash,
        repeats_groups=repeats_groups(stack, model.family, setup.attention),
        reentrant=stack.reentrant,
        has_first_grad=method.lengthens or (stack.reentrant and setup.checkpointing == "full"),
        checkpointed=setup.checkpointing == "full",
        accumulates=setup.grad_accum_steps > 1,
        step_factor=_step_factor(setup),
        spreads=joins,
    )


def _fuses_adapters(setup: TrainSetup, weight: int, adapter: int) -> bool:
    """Whether finefit's kernels compute a linear and its adapter together: PEFT's plain one on a plain linear."""
    is_plain = find_method(setup.method).is_low_rank_sum and setup.quant is None and not setup.dropout
    return is_plain and setup.autocast is None and adapter in (weight, FULL_WIDTH)


def _is_ligers_own(setup: TrainSetup, stack: Stack) -> bool:
    """Whether `kernels: liger` are all of Liger's: a stack that names none is fms-acceleration's, which has no gated MLP."""
    return setup.stack is None or "liger-kernel" in dict(stack.versions)


@functools.lru_cache(maxsize=1024)
def _adapted(
    model: ModelSpec, method: str, targets: str | tuple[str, ...], rank: int
) -> tuple[tuple[str, int], ...]:
    """Each path once, though several kinds of layers may have it."""
    found = adapted_matrices(model, find_method(method), targets)
    return tuple({matrix.path: adapter_rank(matrix, rank) for _, matrix in found}.items())


def _step_factor(setup: TrainSetup) -> float | None:
    """Bytes that a gradient's use takes, over its own; None where gradients wait for the end of the backward."""
    if setup.optimizer_in_backward:
        width = adapter_width(setup) if setup.uses_adapters else DTYPE_BYTES[setup.weights_dtype]
        optimizer = find_optimizer(setup.optimizer)
        return optimizer.step_copies + optimizer.tensor_step_bytes(1, width) / width
    # Added in place to those that are there.
    return 0.0 if setup.grad_accum_steps > 1 else None


_QUANTISED_BITS = {None: 0, "nf4": 4, "nf4-double": 4, "fp4": 4, "int8": 8}

_SCALED_EMBEDDINGS = ("granite", "granitemoe", "gemma", "gemma2", "gemma3_text")
"""Families that multiply the embeddings' output."""


def keeps_embeddings(setup: TrainSetup, model: ModelSpec, stack: Stack) -> bool:
    """Whether the embeddings' output lives beside its multiple, which is the first layer's input.

    Reentrant checkpointing of a frozen base needs that output as a leaf of the graph, which holds it.
    """
    is_leaf = setup.uses_adapters and setup.checkpointing == "full" and stack.reentrant
    return is_leaf and model.family in _SCALED_EMBEDDINGS


LOSS_CHUNK_TOKENS = 512
"""bench.loss takes this many tokens at once."""


def loss_bytes(setup: TrainSetup, model: ModelSpec, stack: Stack, tokens: int, evaluates: bool) -> LossBytes:
    """How the loss of the setup's stack treats the logits.

    One that shifts the logits does so in float32, inside the model's forward; the 16-bit ones are gone by then where
    they were widened first, and under Granite's own loss.
    """
    if setup.loss == "chunked":
        return _chunked_bytes(model, tokens, evaluates, weighs_answers=setup.objective in PAIRED)
    if setup.loss == "fused":
        return LossBytes(chunk_tokens=liger_chunk_tokens(model, tokens), widens=False)
    is_old = stack.shifts_logits
    has_own_loss = model.family in OWN_LOSS_FAMILIES
    return _all_logits(
        is_old=is_old,
        keeps_16bit=not (is_old and (has_own_loss or stack.widens_first)),
        in_place_grad=setup.kernels == "fused" and not setup.runs_own_kernels,
        scaled=model.scales_logits,
        shifted=model.shifts_logits,
        capped=model.logit_softcap,
    )


@functools.cache
def _all_logits(
    *, is_old: bool, keeps_16bit: bool, in_place_grad: bool, scaled: bool, shifted: bool, capped: bool
) -> LossBytes:
    return LossBytes(
        shift_copy=is_old,
        keeps_16bit=keeps_16bit,
        keeps_input=is_old,
        in_place_grad=in_place_grad,
        scaled=scaled,
        shifted=shifted,
        capped=capped,
    )


def _chunked_bytes(model: ModelSpec, tokens: int, evaluates: bool, *, weighs_answers: bool) -> LossBytes:
    """bench.loss.ChunkedCrossEntropy, or bench.logprobs.ChunkedLogProbs: each chunk in the memory of the one before it.

    The logits in the dtype of the product, and widened to float32 where that is narrower; beside them a softcap's
    derivative, the square that it is made of, and the derivative of the chunk before.
    """
    has_slope = model.logit_softcap and not evaluates
    return LossBytes(
        evaluates=evaluates,
        is_recomputed=weighs_answers,
        chunk_tokens=min(LOSS_CHUNK_TOKENS, tokens),
        num_slopes=has_slope * (3 if tokens > LOSS_CHUNK_TOKENS else 2),
    )


def liger_chunk_tokens(model: ModelSpec, tokens: int) -> int:
    """Tokens per chunk of Liger's fused linear cross-entropy.

    Its chunk keeps chunk x vocabulary near tokens x hidden: next power of two of tokens / ceil(V / H)
    (liger_kernel/ops/fused_linear_cross_entropy.py).
    """
    parts = -(-model.vocab_size // model.hidden_size)
    per_chunk = -(-tokens // parts)
    return min(tokens, 1 << (per_chunk - 1).bit_length())
