"""What can only be judged with the model or the machine at hand: a list of laws, each naming its field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from planner.errors import NotModelledError, SetupError
from planner.families import attentions, joins_rows
from planner.methods import check_method, find_method, peak_learning_rate
from planner.optimizers import find_optimizer
from planner.setup import TrainSetup
from planner.specs import GpuProfile, Machine, ModelSpec


@dataclass(frozen=True, slots=True)
class _Law:
    """`is_broken(setup, gpu)` with the field to name and what to say."""

    field: str
    is_broken: Callable[[TrainSetup, GpuProfile], bool]
    message: str


def _uses_bf16(setup: TrainSetup) -> bool:
    return "bfloat16" in (setup.weights_dtype, setup.autocast)


def _needs_bitsandbytes(setup: TrainSetup) -> bool:
    return setup.quant is not None or "bitsandbytes" in find_optimizer(setup.optimizer).factory


_LAWS = (
    _Law(
        "weights_dtype",
        lambda s, g: _uses_bf16(s) and not g.bf16,
        "{gpu} has no bfloat16; use --weights-dtype float16 (adapters stay float32) or float32 with --autocast float16",
    ),
    _Law(
        "attention",
        lambda s, g: s.attention == "flash" and not g.flash_attention,
        "{gpu} has no FlashAttention-2; use sdpa",
    ),
    _Law(
        "quant",
        lambda s, g: _needs_bitsandbytes(s) and not g.bitsandbytes,
        "bitsandbytes has no kernels for {gpu}; use method lora and optimizer adamw",
    ),
    _Law(
        "kernels",
        lambda s, g: s.kernels == "liger" and g.backend == "cpu",
        "Liger's kernels need a GPU; use fused or plain",
    ),
    _Law(
        "loss",
        lambda s, g: s.loss == "fused" and g.backend == "cpu",
        "Liger's fused loss needs a GPU; use chunked",
    ),
    _Law(
        "optimizer_in_backward",
        lambda s, g: s.max_grad_norm is not None and s.optimizer_in_backward and s.weights_dtype == "float16",
        "float16 gradients must be unscaled together; use bfloat16",
    ),
)


LOGIT_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
"""config.json's keys that multiply the logits after the head: a loss that takes the head itself can't know them."""


OBJECTIVES: Mapping[str, str] = {"decoder": "sft", "encoder": "mlm", "encoder-decoder": "seq2seq"}
"""What a model is trained for where nothing is asked for, by its architecture."""
_ARCHITECTURES = {
    **dict.fromkeys(("sft", "pretrain", "dpo"), "decoder"),
    "mlm": "encoder",
    "seq2seq": "encoder-decoder",
}
"""What an objective needs; one that isn't here takes any."""


def _with_article(architecture: str) -> str:
    return f"{'an' if architecture[0] in 'aeiou' else 'a'} {architecture}"


def check(setup: TrainSetup, machine: Machine, model: ModelSpec) -> None:
    """Raise SetupError for the first law that is broken, NotModelledError for a back end without rules."""
    check_method(setup)
    if not machine.gpu.modelled:
        raise NotModelledError(
            f"{machine.gpu.name}: finefit has no memory rules for its back end ({machine.gpu.backend}); not modelled"
        )
    if setup.num_gpus != machine.num_gpus:
        raise SetupError("num_gpus", f"{setup.num_gpus}, but the machine is {machine.label}")
    for law in _LAWS:
        if law.is_broken(setup, machine.gpu):
            raise SetupError(law.field, law.message.format(gpu=machine.gpu.name))
    needed = _ARCHITECTURES.get(setup.objective, model.architecture)
    if model.architecture != needed:
        raise SetupError(
            "objective",
            f"{setup.objective} needs {_with_article(needed)}, and {model.name} is {_with_article(model.architecture)}; "
            f"use {OBJECTIVES[model.architecture]}",
        )
    able = attentions(model)
    if setup.stack is None and setup.attention not in able:
        raise SetupError(
            "attention",
            f"transformers has no {setup.attention} for {model.name}; use {' or '.join(able)}",
        )
    _check_joined(setup, model)
    scale = scaled_logits(model)
    if setup.loss != "full" and scale is not None:
        raise SetupError(
            "loss", f"{setup.loss} doesn't work on {model.name}: it scales its logits ({scale}); use full"
        )


def scaled_logits(model: ModelSpec) -> str | None:
    """config.json's key by which the model multiplies its logits; None where it doesn't."""
    return next((name for name in LOGIT_SCALES if model.config.get(name) not in (None, 1)), None)


def shortest_window(model: ModelSpec) -> int | None:
    """Of its layers' sliding windows, in tokens."""
    return min((layer.window for layer in model.layers if layer.window), default=None)


def _check_joined(setup: TrainSetup, model: ModelSpec) -> None:
    """torch's attention, which takes each document by itself, has no window without a mask."""
    if not setup.joins_rows or setup.attention != "sdpa":
        return
    if not model.is_traced and not joins_rows(model):
        raise SetupError("padding_free", f"{model.name}: its layers can't take each document by itself")
    shortest = shortest_window(model)
    if shortest and shortest < setup.seq_len:
        raise SetupError(
            "padding_free", f"{model.name} has a window of {shortest} tokens, less than seq_len; use packing"
        )


def warnings(setup: TrainSetup, model: ModelSpec) -> list[str]:
    """What is allowed but probably not meant."""
    found = []
    if model.max_positions and setup.seq_len > model.max_positions:
        found.append(
            f"seq_len {setup.seq_len} is more than {model.name} was trained for ({model.max_positions})"
        )
    if setup.method == "full" and setup.weights_dtype == "bfloat16" and setup.master_weights == "none":
        found.append(
            "pure bfloat16 training rounds small updates away; float32 weights with autocast are exact and need twice as much"
        )
    if setup.weights_dtype == "float32" and setup.autocast is None and setup.method != "full":
        found.append("frozen float32 weights take twice the memory of bfloat16 ones")
    return [*found, *_rank_warnings(setup)]


def _rank_warnings(setup: TrainSetup) -> list[str]:
    """A run of rank 256 diverged at LoRA's usual rate (paiml/aprender#2258), which was found with rank 64."""
    method, rate = find_method(setup.method), peak_learning_rate(setup)
    if method.proven_rank is None or setup.rank <= method.proven_rank or rate < method.learning_rate:
        return []
    return [
        f"rank {setup.rank} may diverge at learning rate {rate:g}, which is proven up to rank {method.proven_rank}; "
        f"use method rslora, whose scale suits large ranks (arXiv:2312.03732), or half the rate"
    ]
