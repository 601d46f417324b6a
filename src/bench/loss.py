"""The losses: each makes one micro-batch's loss, summed over its trained tokens and divided by `num_trained`.

`num_trained` counts the trained tokens of all micro-batches of the optimizer step, so that how a global batch is
cut into micro-batches doesn't change its gradient. T: tokens, H: hidden size, V: vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.build import inner_model
from planner.errors import MissingExtraError, NotModelledError, SetupError
from planner.lowering import LOSS_CHUNK_TOKENS

IGNORE_INDEX = -100

Batch = Mapping[str, torch.Tensor]
Phase = Callable[[str], AbstractContextManager[Any]]
Loss = Callable[[nn.Module, Batch, int, Phase], torch.Tensor]


def full_loss(model: nn.Module, batch: Batch, num_trained: int, phase: Phase) -> torch.Tensor:
    """transformers' own loss over all logits, which exist as [T, V] in 16 and in 32 bits."""
    inner = inner_model(model)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with phase("forward"):
        logits = model(**inputs, use_cache=False).logits
    with phase("loss"):
        loss: torch.Tensor = inner.loss_function(
            logits=logits,
            labels=batch["labels"],
            vocab_size=logits.shape[-1],
            num_items_in_batch=num_trained,
        )
    return loss


def chunked_loss(model: nn.Module, batch: Batch, num_trained: int, phase: Phase) -> torch.Tensor:
    """The same value and gradients with the logits of `LOSS_CHUNK_TOKENS` tokens at a time."""
    return _head_loss(model, batch, phase, ChunkedCrossEntropy.apply, num_trained)


def fused_loss(model: nn.Module, batch: Batch, num_trained: int, phase: Phase) -> torch.Tensor:
    """Liger's fused linear cross-entropy (CUDA). Raises MissingExtraError where Liger isn't installed."""
    return _head_loss(model, batch, phase, _liger_cross_entropy, num_trained)


LOSSES: dict[str, Loss] = {"full": full_loss, "chunked": chunked_loss, "fused": fused_loss}


def _head_loss(
    model: nn.Module, batch: Batch, phase: Phase, cross_entropy: Callable[..., torch.Tensor], num_trained: int
) -> torch.Tensor:
    inner = inner_model(model)
    head, softcap = plain_head(inner)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with phase("forward"):
        hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state
    with phase("loss"):
        labels = functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:].reshape(-1)
        rows = hidden.reshape(-1, hidden.shape[-1])
        with_grad = torch.is_grad_enabled()
        return cross_entropy(rows, head.weight, head.bias, labels, num_trained, softcap, with_grad)


def plain_head(inner: Any) -> tuple[nn.Linear, float | None]:
    """The model's head and its logit softcap. Raises SetupError where the loss can't be taken head by head.

    Scaled logits (Cohere, Granite) and an adapter on the head need the logits that the model itself makes.
    """
    head = inner.get_output_embeddings()
    config = inner.config.get_text_config()
    scale = next((n for n in _LOGIT_SCALES if getattr(config, n, None) not in (None, 1, 1.0)), None)
    if type(head) is not nn.Linear or scale:
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
        own = _logits(hidden[0].to(head.weight.dtype), head.weight, head.bias, softcap)
        theirs = inner(input_ids=tokens, use_cache=False).logits[0]
    model.train(was_training)
    if not torch.allclose(own, theirs.float(), rtol=1e-2, atol=1e-2):
        raise SetupError("loss", "chunked and fused: this model changes its logits after the head; use full")


def _logits(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None
) -> torch.Tensor:
    logits = functional.linear(rows, weight, bias).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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
        num_trained: int,
        softcap: float | None,
        with_grad: bool,
    ) -> torch.Tensor:
        """`rows` [T, H], `weight` [V, H], `labels` [T]: the sum of the tokens' losses over `num_trained`."""
        needs = [with_grad and needed for needed in ctx.needs_input_grad[:3]]
        grads = [
            torch.zeros_like(t) if needed and t is not None else None
            for t, needed in zip((rows, weight, bias), needs, strict=True)
        ]
        loss = rows.new_zeros((), dtype=torch.float32)
        for start in range(0, len(rows), LOSS_CHUNK_TOKENS):
            span = slice(start, start + LOSS_CHUNK_TOKENS)
            log_probs, slope = _log_probs(rows[span], weight, bias, softcap, any(needs))
            loss += functional.nll_loss(log_probs, labels[span], ignore_index=IGNORE_INDEX, reduction="sum")
            if any(needs):
                grad_logits = _logit_gradient(log_probs, labels[span], num_trained, slope).to(rows.dtype)
                _add_gradients(grads, grad_logits, rows[span], weight, span)
        ctx.save_for_backward(*grads)
        return loss / num_trained

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """The gradients made in the forward, times that of the loss."""
        scaled = [
            None if grad is None else grad * grad_outputs[0].to(grad.dtype) for grad in ctx.saved_tensors
        ]
        return (*scaled, None, None, None, None)


def _log_probs(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    with_slope: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities in float32 [chunk, V], and the softcap's derivative where there is one."""
    logits = functional.linear(rows, weight, bias)
    if softcap is None:
        return functional.log_softmax(logits, dim=-1, dtype=torch.float32), None
    tanh = torch.tanh(logits.float() / softcap)
    return functional.log_softmax(softcap * tanh, dim=-1), 1 - tanh * tanh if with_slope else None


def _logit_gradient(
    log_probs: torch.Tensor, labels: torch.Tensor, num_trained: int, slope: torch.Tensor | None
) -> torch.Tensor:
    """d loss / d logits = (softmax - one-hot) / num_trained, 0 for untrained tokens; overwrites `log_probs`."""
    is_trained = (labels != IGNORE_INDEX)[:, None]
    grad = log_probs.exp_()
    grad.scatter_add_(1, labels.clamp(min=0)[:, None], grad.new_full((len(labels), 1), -1.0))
    grad.mul_(is_trained / num_trained)
    return grad if slope is None else grad.mul_(slope)


def _add_gradients(
    grads: list[torch.Tensor | None],
    grad_logits: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    span: slice,
) -> None:
    grad_rows, grad_weight, grad_bias = grads
    if grad_rows is not None:
        grad_rows[span] = grad_logits @ weight
    if grad_weight is not None:
        grad_weight += grad_logits.T @ rows
    if grad_bias is not None:
        grad_bias += grad_logits.sum(0)


def _liger_cross_entropy(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    num_trained: int,
    softcap: float | None,
    with_grad: bool,
) -> torch.Tensor:
    try:
        liger = importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        raise MissingExtraError("train (loss: fused)", "liger", "liger-kernel") from error
    if rows.device.type != "cuda":
        raise NotModelledError("loss: fused (Liger) needs CUDA; use chunked")
    fused = liger.LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", softcap=softcap
    )
    loss: torch.Tensor = fused(weight, rows, labels, bias)
    return loss / num_trained
