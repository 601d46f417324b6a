"""What older library versions did otherwise, so that runs published with them can be traced with today's.

Which version did what stands in planner.stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations import sdpa_attention

from bench.build import inner_model
from bench.loss import Batch, Loss, Phase
from planner.setup import TrainSetup
from planner.stack import OWN_LOSS_FAMILIES, casts_back, parse_stack, repeats_groups


def apply_stack(setup: TrainSetup, model: nn.Module) -> None:
    """Change a built model to what the setup's stack did: its checkpointing, its dtypes, its loss function."""
    stack = parse_stack(setup.stack)
    inner = inner_model(model)
    if stack.shifts_logits:
        inner.loss_function = shifted_loss
    if not stack.reentrant:
        return
    if setup.checkpointing == "full":
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
        if setup.uses_adapters:
            inner.enable_input_require_grads()
    if setup.quant and setup.kbit_upcast and casts_back(stack, setup.autocast):
        _narrow_embeddings(inner)


def _narrow_embeddings(inner: Any) -> None:
    """Embeddings and head in 16 bits again, after peft has widened all 16-bit weights."""
    for module in (inner.get_input_embeddings(), inner.get_output_embeddings()):
        if module is not None and module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.to(torch.bfloat16)


def stack_loss(setup: TrainSetup, model: nn.Module) -> Loss | None:
    """How Hugging Face's Trainer of the setup's stack takes the loss; None where finefit's own way is meant.

    A stack that is named means that Trainer. Chunked and fused losses are the same in both.
    """
    if setup.stack is None or setup.loss != "full":
        return None
    stack = parse_stack(setup.stack)
    is_own = inner_model(model).config.model_type in OWN_LOSS_FAMILIES
    if is_own and stack.shifts_logits:
        return own_loss
    return partial(trainer_loss, widens=stack.widens_first)


@contextmanager
def stack_attention(setup: TrainSetup, family: str) -> Iterator[None]:
    """Grouped keys and values reach the kernel as the setup's stack handed them over."""
    if not repeats_groups(parse_stack(setup.stack), family, setup.attention):
        yield
        return
    with mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False):
        yield


def trainer_loss(
    model: nn.Module, batch: Batch, num_trained: float, phase: Phase, *, widens: bool = False
) -> torch.Tensor:
    """The loss inside the model's forward, whose last hidden state is alive beside the logits.

    `widens`: the head's product is float32 before anything else has seen it.
    """
    head = inner_model(model).get_output_embeddings()
    with ExitStack() as phases:
        phases.enter_context(phase("forward"))

        def begin_loss(_module: nn.Module, _inputs: Any, logits: torch.Tensor) -> torch.Tensor | None:
            phases.enter_context(phase("loss"))
            return logits.float() if widens else None

        handle = head.register_forward_hook(begin_loss)
        loss: torch.Tensor = model(**batch, use_cache=False).loss
        handle.remove()
    return loss


def own_loss(model: nn.Module, batch: Batch, num_trained: float, phase: Phase) -> torch.Tensor:
    """Granite's: scaled logits, whose 16-bit form is gone once the float32 one exists."""
    inner = inner_model(model)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with phase("forward"):
        hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state
    with phase("loss"):
        logits = inner.get_output_embeddings()(hidden) / inner.config.logits_scaling
        logits = logits.float()
        return shifted_loss(logits=logits, labels=batch["labels"], vocab_size=logits.shape[-1])


def shifted_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """Cross-entropy of float32 logits [batch, tokens, vocab_size], cut by one token and copied."""
    wide = logits.float()
    shifted = wide[..., :-1, :].contiguous().view(-1, vocab_size)
    return functional.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1), ignore_index=-100)
