"""The losses: each makes one micro-batch's loss, summed over its trained tokens and divided by `num_trained`.

`num_trained` counts the trained tokens of all micro-batches of the optimizer step, so that how a global batch is
cut into micro-batches doesn't change its gradient. T: tokens, H: hidden size, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from bench.accuracy import count_hits
from bench.build import inner_model
from bench.liger import import_liger
from planner.errors import NotModelledError, SetupError
from planner.lowering import LOSS_CHUNK_TOKENS

IGNORE_INDEX = -100

NOT_INPUTS = ("labels", "trained_rows", "reference_logps")
"""Keys of a batch that the model isn't given."""

Batch = Mapping[str, Any]
Phase = Callable[[str], AbstractContextManager[Any]]
Loss = Callable[[nn.Module, Batch, float, Phase], torch.Tensor]


def full_loss(model: nn.Module, batch: Batch, num_trained: float, phase: Phase) -> torch.Tensor:
    """transformers' own loss over all logits, which exist as [T, V] in 16 and in 32 bits."""
    inner = inner_model(model)
    inputs = model_inputs(batch)
    with phase("forward"):
        logits = model(**inputs, use_cache=False).logits
    with phase("loss"):
        labels = after_learned_tokens(batch["labels"], logits)
        loss: torch.Tensor = inner.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=logits.shape[-1],
            num_items_in_batch=num_trained,
            **({"shift_labels": labels} if _is_aligned(inner) else {}),
        )
        after = 0 if _is_aligned(inner) else 1
        count_hits(logits[:, : logits.shape[1] - after], labels[:, after:])
    return loss


def after_learned_tokens(labels: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Labels [B, T] for outputs [B, n + T, ...]: the n tokens that a method has put ahead of each row give no loss."""
    num_ahead = outputs.shape[1] - labels.shape[1]
    return functional.pad(labels, (num_ahead, 0), value=IGNORE_INDEX) if num_ahead else labels


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What of a batch the model's forward is given."""
    return {name: value for name, value in batch.items() if name not in NOT_INPUTS}


def _is_aligned(inner: Any) -> bool:
    """Whether a label stands where its logits are: a decoder of its own is given its tokens shifted."""
    return bool(inner.config.is_encoder_decoder)


def chunked_loss(model: nn.Module, batch: Batch, num_trained: float, phase: Phase) -> torch.Tensor:
    """The same value and gradients with the logits of `LOSS_CHUNK_TOKENS` tokens at a time."""
    return _head_loss(model, batch, phase, ChunkedCrossEntropy.apply, num_trained)


def fused_loss(model: nn.Module, batch: Batch, num_trained: float, phase: Phase) -> torch.Tensor:
    """Liger's fused linear cross-entropy (CUDA). Raises MissingExtraError where Liger isn't installed."""
    return _head_loss(model, batch, phase, _liger_cross_entropy, num_trained)


LOSSES: dict[str, Loss] = {"full": full_loss, "chunked": chunked_loss, "fused": fused_loss}


def _head_loss(
    model: nn.Module,
    batch: Batch,
    phase: Phase,
    cross_entropy: Callable[..., torch.Tensor],
    num_trained: float,
) -> torch.Tensor:
    inner = inner_model(model)
    head, softcap = plain_head(inner)
    with phase("forward"):
        hidden = last_hidden(model, head, model_inputs(batch))
    with phase("loss"):
        labels = after_learned_tokens(batch["labels"], hidden)
        if not _is_aligned(inner):
            labels = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        labels = labels.reshape(-1)
        rows = hidden.reshape(-1, hidden.shape[-1])
        trained = trained_rows(batch, hidden)
        with_grad = torch.is_grad_enabled()
        return cross_entropy(rows, head.weight, head.bias, labels, trained, num_trained, softcap, with_grad)


def last_hidden(model: Any, head: nn.Module, inputs: Batch) -> torch.Tensor:
    """What the head reads."""
    inner, hidden = inner_model(model), None
    learns_tokens = hasattr(model, "active_peft_config") and model.active_peft_config.is_prompt_learning
    if inner.base_model is not inner and not learns_tokens:
        hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state
    else:
        # T5 has no module below the head, and may scale in between; PEFT adds learned tokens above.
        with mock.patch.object(head, "forward", lambda rows: rows):
            hidden = (model if learns_tokens else inner)(**inputs, use_cache=False).logits
    found: torch.Tensor = hidden
    return found


def plain_head(inner: Any) -> tuple[nn.Linear, float | None]:
    """The model's head and its logit softcap. Raises SetupError where the loss can't be taken head by head.

    Scaled logits (Cohere, Granite) and an adapter on the head need the logits that the model itself makes.
    """
    head = inner.get_output_embeddings()
    config = inner.config.get_text_config()
    scale = next((n for n in _LOGIT_SCALES if getattr(config, n, None) not in (None, 1, 1.0)), None)
    # FSDP2 makes a class of its own of what it wraps
    is_plain = type(head) is nn.Linear or (isinstance(head, nn.Linear) and isinstance(head, FSDPModule))
    if not is_plain or scale:
        reason = f"its logits are scaled ({scale})" if scale else "its head is no plain linear layer"
        raise SetupError("loss", f"chunked and fused don't work on this model: {reason}; use full")
    return head, getattr(config, "final_logit_softcapping", None)


_LOGIT_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def check_head(model: nn.Module) -> None:
    """Raise SetupError unless the head alone gives the logits that the model gives: some scale or shift them."""
    inner = inner_model(model)
    head, softcap = plain_head(inner)
    tokens = torch.arange(1, 5, device=head.weight.device)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        hidden = inner.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        own = _head_logits(hidden[0].to(head.weight.dtype), head, softcap)
        theirs = inner(input_ids=tokens, use_cache=False).logits[0]
    model.train(was_training)
    if not torch.allclose(own, theirs.float(), rtol=1e-2, atol=1e-2):
        raise SetupError("loss", "chunked and fused: this model changes its logits after the head; use full")


def _head_logits(rows: torch.Tensor, head: nn.Linear, softcap: float | None) -> torch.Tensor:
    logits: torch.Tensor = head(rows).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def trained_rows(batch: Batch, hidden: torch.Tensor) -> torch.Tensor | None:
    """Which rows of the hidden states have a label; None: unknown, so all may."""
    # where learned tokens stand ahead, the rows have other numbers
    return batch.get("trained_rows") if hidden.shape[1] == batch["labels"].shape[1] else None


def longest_chunk(rows: torch.Tensor, trained: torch.Tensor | None) -> int:
    """Rows of the largest chunk of `chunk_rows`."""
    return min(LOSS_CHUNK_TOKENS, len(rows) if trained is None else len(trained))


def chunk_rows(rows: torch.Tensor, trained: torch.Tensor | None) -> Iterator[slice | torch.Tensor]:
    """Which of `rows` [T, H] each chunk takes: of all, or of those that `trained` [n] numbers."""
    for start in range(0, len(rows) if trained is None else len(trained), LOSS_CHUNK_TOKENS):
        span = slice(start, start + LOSS_CHUNK_TOKENS)
        yield span if trained is None else trained[span]


class ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Head and cross-entropy, chunk by chunk; each chunk's gradients are made beside its loss.

    So the head's product is computed once, as with full logits, and what waits for the backward is the
    gradient of the hidden states [T, H] and, where the head trains, that of its weight [V, H].
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        trained: torch.Tensor | None,
        num_trained: float,
        softcap: float | None,
        with_grad: bool,
    ) -> torch.Tensor:
        """`rows` [T, H], `weight` [V, H], `labels` [T]: the sum of the tokens' losses over `num_trained`.

        `trained` [n] numbers the rows that have a label; None takes all. No other row's logits are computed.
        """
        grads = [
            torch.zeros_like(t) if with_grad and needed and t is not None else None
            for t, needed in zip((rows, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        has_grads = any(grad is not None for grad in grads)
        dtype = compute_dtype(rows)
        with torch.autocast(rows.device.type, enabled=False):
            chunk = Chunk(longest_chunk(rows, trained), weight, bias, dtype, softcap)
            loss = rows.new_zeros((), dtype=torch.float32)
            for span in chunk_rows(rows, trained):
                part, targets = rows[span].to(dtype), labels[span]
                loss += chunk.losses(part, targets, has_grads).sum()
                if has_grads:
                    weights = (targets != IGNORE_INDEX)[:, None] / num_trained
                    grad_logits = chunk.gradient(targets, weights)
                    add_gradients(grads, grad_logits, part, chunk.weight, span)
        ctx.save_for_backward(*grads)
        return loss / num_trained

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """The gradients made in the forward, times that of the loss."""
        scaled = [
            None if grad is None else grad * grad_outputs[0].to(grad.dtype) for grad in ctx.saved_tensors
        ]
        return (*scaled, None, None, None, None, None)


def compute_dtype(rows: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply `rows` here."""
    device = rows.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    return dtype


class Chunk:
    """The logits of one chunk after another, in the same memory: in 16 bits, and widened to float32.

    Memory that is asked for anew for each chunk costs the CPU as much as the arithmetic: the kernel hands it out
    in pages of zeros.
    """

    def __init__(
        self,
        num_rows: int,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        softcap: float | None,
    ) -> None:
        self.weight, self.softcap = weight.to(dtype), softcap
        self.bias = None if bias is None else bias.to(dtype)
        shape = (num_rows, len(weight))
        self._logits = weight.new_empty(shape, dtype=dtype)
        is_wide = dtype == torch.float32
        self._wide = self._logits if is_wide else weight.new_empty(shape, dtype=torch.float32)

    def losses(self, rows: torch.Tensor, labels: torch.Tensor, with_grad: bool) -> torch.Tensor:
        """The losses [n, 1] of `rows` [n, H], 0 for untrained tokens; keeps what `gradient` needs."""
        logits, wide = self._logits[: len(rows)], self._wide[: len(rows)]
        torch.mm(rows, self.weight.T, out=logits)
        if self.bias is not None:
            logits += self.bias
        wide.copy_(logits)
        self._slope = self._cap(wide, with_grad)
        at_label = wide.gather(1, labels.clamp(min=0)[:, None])
        highest = wide.amax(1, keepdim=True)
        count_hits(wide, labels)
        self._exp = wide.sub_(highest).exp_()
        self._sum = self._exp.sum(1, keepdim=True)
        losses = highest + self._sum.log() - at_label
        return losses.masked_fill_((labels == IGNORE_INDEX)[:, None], 0.0)

    def _cap(self, wide: torch.Tensor, with_grad: bool) -> torch.Tensor | None:
        """Apply the softcap in place; its derivative where that is needed."""
        if self.softcap is None:
            return None
        wide.div_(self.softcap).tanh_()
        slope = 1 - wide * wide if with_grad else None
        wide.mul_(self.softcap)
        return slope

    def gradient(self, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """d loss / d logits [n, V] of the last rows: (softmax - one-hot) times `weights` [n, 1]."""
        grad = self._exp.mul_(weights / self._sum)
        grad.scatter_add_(1, labels.clamp(min=0)[:, None], -weights)
        if self._slope is not None:
            grad.mul_(self._slope)
        return self._logits[: len(labels)].copy_(grad)


def add_gradients(
    grads: list[torch.Tensor | None],
    grad_logits: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    span: slice | torch.Tensor,
) -> None:
    """Add a chunk's part to the gradients of rows, weight and bias, None where one isn't wanted."""
    grad_rows, grad_weight, grad_bias = grads
    if grad_rows is not None:
        product = grad_logits @ weight
        # A slice takes any dtype, numbered rows only their own.
        grad_rows[span] = product if isinstance(span, slice) else product.to(grad_rows.dtype)
    if grad_weight is not None and grad_weight.dtype == rows.dtype:
        grad_weight.addmm_(grad_logits.T, rows)
    elif grad_weight is not None:
        grad_weight += grad_logits.T @ rows
    if grad_bias is not None:
        grad_bias += grad_logits.sum(0)


def _liger_cross_entropy(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    trained: torch.Tensor | None,
    num_trained: float,
    softcap: float | None,
    with_grad: bool,
) -> torch.Tensor:
    if trained is not None:
        rows, labels = rows[trained], labels[trained]
    liger = import_liger("", "loss: fused")
    if rows.device.type != "cuda":
        raise NotModelledError("loss: fused (Liger) needs CUDA; use chunked")
    fused = liger.LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", softcap=softcap
    )
    loss: torch.Tensor = fused(weight, rows, labels, bias)
    return loss / num_trained
