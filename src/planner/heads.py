"""The model's end as the operations that torch runs for it: final norm, head and loss (see planner.tape)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from planner.linears import Linears, Recipe
from planner.operations import Product
from planner.pointwise import activation
from planner.specs import Matrix, ModelSpec
from planner.tape import FULL_WIDTH, LOGITS, ZERO, BlockMemory, Tape, Tensor, add, constant, per_token
from planner.work import Passes


@dataclass(frozen=True, kw_only=True, slots=True)
class LossBytes:
    """How a loss treats the logits.

    With all of them at once (`chunk_tokens` 0), they are cast to float32: `shift_copy` then slices and copies them
    (transformers before the labels were padded instead); `keeps_16bit` and `keeps_input`: the model's forward
    still holds the 16-bit logits, or the head's input, while the loss runs; `in_place_grad`: a fused cross-entropy
    writes the gradient over the float32 logits; `scaled`: logits are multiplied once; `shifted`: something is added to them; `capped`: by a tanh.
    `ends_at_logits`: the forward only. Chunk by chunk: `chunk_tokens` at a time; `widens`: with a float32 copy of a
    chunk's 16-bit logits, `num_slopes` float32 tensors like it beside; `evaluates`: without gradients; `is_recomputed`:
    the backward makes them again, since only then it is known how much each token weighs.
    """

    shift_copy: bool = False
    keeps_16bit: bool = True
    keeps_input: bool = False
    in_place_grad: bool = False
    scaled: bool = False
    shifted: bool = False
    capped: bool = False
    ends_at_logits: bool = False
    chunk_tokens: int = 0
    widens: bool = True
    num_slopes: int = 0
    evaluates: bool = False
    is_recomputed: bool = False


@functools.lru_cache(maxsize=1024)
def head_memory(model: ModelSpec, norm: str, recipe: Recipe, kind: LossBytes, width: int) -> BlockMemory:
    """The last layer's output, of `width` bytes per element, final norm, head and loss."""
    return _recorded(model, norm, recipe, kind, width).play(step_factor=recipe.step_factor)


@functools.lru_cache(maxsize=1024)
def head_work(model: ModelSpec, norm: str, recipe: Recipe, kind: LossBytes, width: int) -> Passes:
    """What the same part of the model computes and moves."""
    return _recorded(model, norm, recipe, kind, width).passes()


def _recorded(model: ModelSpec, norm: str, recipe: Recipe, kind: LossBytes, width: int) -> Tape:
    block = _Head(recipe)
    size = per_token(width * model.hidden_size)
    layers = block.tape.input(size, width)
    stream = block.tape.run([layers], size, width, shares_grad=True)
    hidden = block.transformed(stream, model, norm)
    if model.head is not None and kind.is_recomputed:
        block.chunked_log_probs(hidden, model.head, kind)
    elif model.head is not None and kind.chunk_tokens:
        block.chunked_loss(hidden, model.head, kind)
    elif model.head is not None:
        block.loss(hidden, model.head, kind)
    return block.tape


class _Head(Linears):
    """A block that ends in a loss."""

    def transformed(self, stream: Tensor, model: ModelSpec, norm: str) -> Tensor:
        """What the head reads: behind the final norm, or a masked-language model's linear, activation and norm."""
        if model.architecture == "encoder-decoder":
            return self._after_two_stacks(stream, model, norm)
        if model.architecture != "encoder":
            return self.norm(stream, model.hidden_size, norm)
        for matrix in model.outside:
            stream = self.linear(stream, matrix)
            stream = activation(
                self.tape, stream, matrix.out_features, model.layers[-1].activation, autocast=False
            )
        return self.norm(stream, model.hidden_size, norm) if model.outside else stream

    def _after_two_stacks(self, stream: Tensor, model: ModelSpec, norm: str) -> Tensor:
        """Behind the decoder's final norm and dropout, multiplied where head and embeddings are one."""
        if model.final_norm:
            stream = self.norm(stream, model.hidden_size, norm)
            if model.layers[-1].dropout:
                stream = self.dropped(stream)
        if model.scales_output:
            stream = self.tape.run([stream], stream.gradient, stream.width)
        return stream

    def loss(self, hidden: Tensor, head: Matrix, kind: LossBytes) -> None:
        """Head product, float32 copy, log-softmax, negative log-likelihood."""
        wide = per_token(FULL_WIDTH * head.out_features)
        first = logits = self.product(hidden, head, 1.0, LOGITS)
        narrow, width = logits.size, logits.width
        if kind.shifted:
            # A buffer in the weights' dtype.
            width = max(width, self.recipe.weight)
            narrow = per_token(width * head.out_features)
            first = logits = self.tape.run([logits], narrow, width, category=LOGITS, shares_grad=True)
        if kind.scaled:
            first = logits = self.tape.run([logits], narrow, width, category=LOGITS)
        if kind.capped:
            logits = self.tape.run([logits], narrow, width, category=LOGITS)
            logits = self.tape.run([logits], narrow, width, saves_output=True, category=LOGITS)
            first = logits = self.tape.run([logits], narrow, width, category=LOGITS)
        if kind.ends_at_logits:
            # The model's forward has it in a variable.
            self.tape.hold(hidden)
            return
        if width != FULL_WIDTH:
            logits = self.tape.run([logits], wide, FULL_WIDTH, category=LOGITS)
        if kind.shift_copy:
            upcast = logits
            logits = self.tape.run([logits], wide, FULL_WIDTH, category=LOGITS)
            self._hold_until_loss(upcast)
        if kind.keeps_16bit:
            self._hold_until_loss(first)
        if kind.keeps_input:
            self._hold_until_loss(hidden)
        if kind.in_place_grad:
            logits.grad_size = ZERO
            self.tape.run([logits], per_token(FULL_WIDTH), FULL_WIDTH, saves=[logits], category=LOGITS)
            return
        log_probs = self.tape.run([logits], wide, FULL_WIDTH, saves_output=True, category=LOGITS)
        self.tape.run([log_probs], ZERO, FULL_WIDTH, saves=[log_probs], category=LOGITS)

    def chunked_loss(self, hidden: Tensor, head: Matrix, kind: LossBytes) -> None:
        """Each chunk's logits give its gradients at once; those of input and weight wait for the backward.

        The backward multiplies them by the loss' gradient, out of place. A weight in another dtype than the
        product's is copied, and its gradient is added from a product of its own.
        """
        recipe = self.recipe
        width = recipe.compute if recipe.autocast else hidden.width
        trains = recipe.trains_base and not kind.evaluates
        weight = constant(head.num_weights * recipe.weight) if trains else ZERO
        rows = ZERO if kind.evaluates else per_token(hidden.width * head.in_features)
        temp = _chunk_bytes(head, kind, width, copies_rows=hidden.width != width)
        temp += (recipe.weight != width) * width * head.num_weights
        if not kind.evaluates:
            temp += self._chunk_product(head, kind, width)
        per_logit = _bytes_per_logit(kind, width)
        num_products = 1 if kind.evaluates else 2 + trains
        weight_reads = num_products * width * head.num_weights / kind.chunk_tokens
        grads = self.tape.run(
            [hidden],
            add(rows, weight),
            hidden.width,
            saves_output=True,
            temp=constant(temp),
            weight_grad=weight,
            category=LOGITS,
            product=Product(flops=per_token(2.0 * num_products * head.num_weights), backward=0.0),
            traffic=per_token(2.0 * per_logit * head.out_features + weight_reads),
        )
        grads.grad_size = ZERO
        self.tape.run([grads], ZERO, FULL_WIDTH, category=LOGITS)

    def chunked_log_probs(self, hidden: Tensor, head: Matrix, kind: LossBytes) -> None:
        """One number for each token; the backward makes each chunk's logits again, and from them the gradients."""
        recipe = self.recipe
        width = recipe.compute if recipe.autocast else hidden.width
        plain = replace(kind, num_slopes=0)
        copied = (recipe.weight != width) * width * head.num_weights
        chunk = copied + _chunk_bytes(head, plain, width, copies_rows=hidden.width != width)
        made = _chunk_bytes(head, kind, width, copies_rows=hidden.width != width) + copied
        num_products = 2 + recipe.trains_base
        reads = (1 + num_products) * width * head.num_weights / kind.chunk_tokens
        logps = self.tape.run(
            [hidden],
            per_token(FULL_WIDTH),
            FULL_WIDTH,
            saves=[hidden],
            temp=constant(chunk),
            grad_temp=constant(made + self._chunk_product(head, kind, width)),
            weight_grad=constant(head.num_weights * recipe.weight) if recipe.trains_base else ZERO,
            category=LOGITS,
            product=Product(flops=per_token(2.0 * head.num_weights), backward=float(num_products)),
            traffic=per_token(4.0 * _bytes_per_logit(kind, width) * head.out_features + reads),
        )
        self.tape.run([logps], ZERO, FULL_WIDTH, category=LOGITS)

    def _chunk_product(self, head: Matrix, kind: LossBytes, width: int) -> int:
        """What a chunk's gradients of rows or weight are before they are added, over what is gone by then."""
        trains = self.recipe.trains_base and self.recipe.weight != width
        product = max(trains * width * head.num_weights, kind.chunk_tokens * width * head.in_features)
        # By then a softcap's derivative alone is left of what it was made of.
        done = FULL_WIDTH * max(0, kind.num_slopes - 1) * kind.chunk_tokens * head.out_features
        return max(0, product - done)

    def _hold_until_loss(self, tensor: Tensor) -> None:
        """A Python variable that keeps a tensor alive until the loss is there."""
        tensor.last_use = len(self.tape.operations)


def _chunk_bytes(head: Matrix, kind: LossBytes, width: int, *, copies_rows: bool) -> int:
    """A chunk's logits in all their dtypes, and its rows where the product takes another dtype than theirs."""
    logits = _bytes_per_logit(kind, width) * head.out_features
    return kind.chunk_tokens * (logits + copies_rows * width * head.in_features)


def _bytes_per_logit(kind: LossBytes, width: int) -> int:
    widened = FULL_WIDTH if kind.widens and width < FULL_WIDTH else 0
    return width + widened + FULL_WIDTH * kind.num_slopes
