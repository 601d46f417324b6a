"""Log probabilities that a model gives its rows' labels: what objectives compare that weigh whole answers.

Like the losses (bench.loss) with all logits at once, or chunk by chunk. T: tokens, H: hidden size, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.build import inner_model
from bench.loss import (
    IGNORE_INDEX,
    Batch,
    Chunk,
    add_gradients,
    after_learned_tokens,
    chunk_rows,
    compute_dtype,
    last_hidden,
    longest_chunk,
    model_inputs,
    plain_head,
    trained_rows,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogProbs:
    """The model's forward, and from what it gives each token's log probability [rows, T]; one without a label has 0."""

    forward: Callable[[nn.Module, Batch], torch.Tensor]
    of: Callable[[nn.Module, torch.Tensor, Batch], torch.Tensor]


def _shifted_labels(batch: Batch, made: torch.Tensor) -> torch.Tensor:
    """Labels [rows, T] where the logits are that predict them."""
    labels = after_learned_tokens(batch["labels"], made)
    return functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = model(**model_inputs(batch), use_cache=False).logits
    return logits


def _of_logits(model: nn.Module, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """As transformers takes its loss: in float32, [rows * T, V] at once."""
    labels = _shifted_labels(batch, logits)
    rows = logits.float().view(-1, logits.shape[-1])
    losses = functional.cross_entropy(rows, labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="none")
    return -losses.view(labels.shape)


def _hidden(model: nn.Module, batch: Batch) -> torch.Tensor:
    return last_hidden(model, plain_head(inner_model(model))[0], model_inputs(batch))


def _of_hidden(model: nn.Module, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    head, softcap = plain_head(inner_model(model))
    labels = _shifted_labels(batch, hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    trained = trained_rows(batch, hidden)
    logps: torch.Tensor = ChunkedLogProbs.apply(
        rows, head.weight, head.bias, labels.reshape(-1), trained, softcap
    )
    return logps.view(labels.shape)


LOG_PROBS: dict[str, LogProbs] = {
    "full": LogProbs(forward=_logits, of=_of_logits),
    "chunked": LogProbs(forward=_hidden, of=_of_hidden),
}
"""By the setup's `loss`."""


class ChunkedLogProbs(torch.autograd.Function):  # type: ignore[misc]
    """Head and log-softmax at the labels, chunk by chunk.

    How much each token weighs is known only when all are summed, so the backward computes each chunk's logits again;
    what waits for it is the hidden states [T, H].
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        trained: torch.Tensor | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """`rows` [T, H], `weight` [V, H], `labels` [T]: the tokens' log probabilities [T] in float32.

        `trained` [n] numbers the rows that have a label; None takes all. No other row's logits are computed.
        """
        ctx.dtype, ctx.softcap = compute_dtype(rows), softcap
        ctx.save_for_backward(rows, weight, bias, labels, trained)
        logps = rows.new_zeros(len(rows), dtype=torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            chunk = Chunk(longest_chunk(rows, trained), weight, bias, ctx.dtype, softcap)
            for span in chunk_rows(rows, trained):
                logps[span] = -chunk.losses(rows[span].to(ctx.dtype), labels[span], with_grad=False)[:, 0]
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """d / d rows, weight and bias of the sum of the log probabilities, each times its gradient."""
        rows, weight, bias, labels, trained = ctx.saved_tensors
        grads = [
            torch.zeros_like(t) if needed and t is not None else None
            for t, needed in zip((rows, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        chunk = Chunk(longest_chunk(rows, trained), weight, bias, ctx.dtype, ctx.softcap)
        for span in chunk_rows(rows, trained):
            part, targets = rows[span].to(ctx.dtype), labels[span]
            chunk.losses(part, targets, with_grad=True)
            weights = -grad_outputs[0][span, None] * (targets != IGNORE_INDEX)[:, None]
            add_gradients(grads, chunk.gradient(targets, weights), part, chunk.weight, span)
        return (*grads, None, None, None)
