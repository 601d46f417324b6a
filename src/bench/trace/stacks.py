"""What older library versions did otherwise, so that runs published with them can be traced with today's.

Each rule names the version until which it held and where that stands.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.build import inner_model
from bench.loss import Batch, Loss, Phase
from planner.setup import TrainSetup
from planner.stack import parse_stack

LAST_SHIFTED_LOGITS = (4, 50)
"""Before it, transformers shifted the logits and copied them (loss/loss_utils.py), since then the labels."""
OWN_LOSS_FAMILIES = ("granite", "granitemoe")
"""Families whose modeling file took the loss itself and dropped the 16-bit logits first (transformers 4.48)."""


def apply_stack(setup: TrainSetup, model: nn.Module) -> None:
    """Change a built model to what the setup's stack did: its checkpointing, its dtypes, its loss function."""
    stack = parse_stack(setup.stack)
    inner = inner_model(model)
    if stack.is_before("transformers", *LAST_SHIFTED_LOGITS):
        inner.loss_function = shifted_loss
    if not stack.is_before("transformers", 5):
        return
    if setup.checkpointing == "full":
        # The Trainer's default until transformers 5.
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
        if setup.uses_adapters:
            inner.enable_input_require_grads()
    if setup.quant and setup.kbit_upcast:
        _narrow_embeddings(inner)


def _narrow_embeddings(inner: Any) -> None:
    """trl's SFTTrainer casts embeddings and head back after peft has widened all 16-bit weights
    (trl 0.x, peft_module_casting_to_bf16): only the norms stay in float32.
    """
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
    return own_loss if is_own and stack.is_before("transformers", *LAST_SHIFTED_LOGITS) else trainer_loss


def trainer_loss(model: nn.Module, batch: Batch, num_trained: int, phase: Phase) -> torch.Tensor:
    """The loss inside the model's forward, whose last hidden state is alive beside the logits."""
    head = inner_model(model).get_output_embeddings()
    with ExitStack() as phases:
        phases.enter_context(phase("forward"))

        def begin_loss(*_: Any) -> None:
            phases.enter_context(phase("loss"))

        handle = head.register_forward_hook(begin_loss)
        loss: torch.Tensor = model(**batch, use_cache=False).loss
        handle.remove()
    return loss


def own_loss(model: nn.Module, batch: Batch, num_trained: int, phase: Phase) -> torch.Tensor:
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
