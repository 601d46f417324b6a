"""DeepSpeed: ds_config.json for ZeRO-1, 2 and 3 with offload (checked against DeepSpeed 0.19.8).

The keys are those of deepspeed/runtime/{config,precision_config}.py and deepspeed/runtime/zero/*config.py.
Numbers are written out, not left to "auto", so that the file can be used with and without a trainer.
"""

from __future__ import annotations

import json
from typing import Any

from planner import sharding
from planner.errors import SetupError
from planner.methods import peak_learning_rate
from planner.setup import TrainSetup

SUMMARY = "ds_config.json for DeepSpeed's ZeRO stages, with offload"

FILE_NAME = "ds_config.json"

STAGES = {"none": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
"""Our sharding -> DeepSpeed's stage."""

ADAMW = ("adamw", "adamw-fused")
"""The optimizers that DeepSpeed's own `AdamW` section stands for; the others are passed to it by the script."""

_WRITTEN = {
    "micro_batch_size",
    "grad_accum_steps",
    "max_grad_norm",
    "sharding",
    "offload",
    "weights_dtype",
    "autocast",
    "master_weights",
    "optimizer",
    "learning_rate",
    "weight_decay",
}
SCRIPT = "the training script sets this; ds_config.json has no key for it"
_LAUNCHER = "given to the launcher (deepspeed --num_gpus … --num_nodes …)"


def export(setup: TrainSetup, gpu: str) -> dict[str, str]:
    """ds_config.json. Raises SetupError for a sharding that isn't DeepSpeed's."""
    return {FILE_NAME: json.dumps(config(setup), indent=2) + "\n"}


def config(setup: TrainSetup) -> dict[str, Any]:
    """The file's content. Raises SetupError for a sharding that isn't DeepSpeed's."""
    if setup.sharding not in STAGES:
        raise SetupError("sharding", f"{setup.sharding} is not DeepSpeed's; use {', '.join(STAGES)}")
    return {
        "train_micro_batch_size_per_gpu": setup.micro_batch_size,
        "gradient_accumulation_steps": setup.grad_accum_steps,
        "gradient_clipping": setup.max_grad_norm or 0.0,
        "zero_optimization": _zero(setup),
        **precision(setup),
        **_optimizer(setup),
    }


def _zero(setup: TrainSetup) -> dict[str, Any]:
    is_zero3 = setup.sharding == "zero3"
    section: dict[str, Any] = {"stage": STAGES[setup.sharding]}
    if section["stage"]:
        # What the estimate counts on: planner.sharding.
        section |= {
            "contiguous_gradients": True,
            "overlap_comm": is_zero3,
            "reduce_bucket_size": sharding.ZERO.bucket,
            "allgather_bucket_size": sharding.ZERO.bucket,
        }
    on_host = {"device": "cpu", "pin_memory": True}
    if setup.offload != "none":
        section["offload_optimizer"] = on_host
    if setup.offload == "params+optimizer":
        section["offload_param"] = on_host
    if is_zero3:
        section["stage3_max_reuse_distance"] = sharding.ZERO.reuse
        section["stage3_max_live_parameters"] = sharding.ZERO.reuse
        section["stage3_prefetch_bucket_size"] = sharding.ZERO.prefetch
        section["stage3_param_persistence_threshold"] = sharding.ZERO.persistent
        # Otherwise a saved full fine-tune holds placeholders instead of weights.
        section["stage3_gather_16bit_weights_on_model_save"] = True
    return section


def precision(setup: TrainSetup) -> dict[str, Any]:
    """The sections bf16, fp16 and torch_autocast: 16-bit weights by the first two, float32 by the last."""
    if setup.weights_dtype == "float32":
        return {"torch_autocast": {"enabled": True, "dtype": setup.autocast}} if setup.autocast else {}
    if setup.weights_dtype == "float16":
        section: dict[str, Any] = {"enabled": True, "loss_scale": 0}
        return {"fp16": section | ({"fp16_master_weights_and_grads": True} if _is_pure(setup) else {})}
    pure = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return {"bf16": {"enabled": True} | (pure if _is_pure(setup) else {})}


def _is_pure(setup: TrainSetup) -> bool:
    """Whether DeepSpeed can do without its float32 master copy, and is asked to.

    It can with a ZeRO stage; for float16, and where the optimizer is offloaded, only with its own CPU AdamW.
    """
    has_cpu_adamw = setup.offload != "none" and setup.optimizer in ADAMW
    is_possible = has_cpu_adamw or (setup.weights_dtype == "bfloat16" and setup.offload == "none")
    return setup.master_weights == "none" and STAGES[setup.sharding] > 0 and is_possible


def _optimizer(setup: TrainSetup) -> dict[str, Any]:
    if setup.optimizer not in ADAMW:
        return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    params: dict[str, Any] = {
        "lr": peak_learning_rate(setup),
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": setup.weight_decay,
    }
    if setup.offload == "none":
        # torch's AdamW; DeepSpeed's own would have to be compiled on the machine first.
        params |= {"torch_adam": True, "fused" if setup.optimizer == "adamw-fused" else "foreach": True}
    return {"optimizer": {"type": "AdamW", "params": params}}


def left_out(setup: TrainSetup) -> dict[str, str]:
    """The fields that the training script or the launcher sets, and those that DeepSpeed treats otherwise."""
    out = {name: SCRIPT for name in setup.to_dict() if name not in _WRITTEN}
    out |= {"num_gpus": _LAUNCHER, "num_nodes": _LAUNCHER}
    if setup.optimizer not in ADAMW:
        why = "the training script passes its own optimizer to deepspeed.initialize"
        out |= dict.fromkeys(("optimizer", "learning_rate", "weight_decay"), why)
    return out | _otherwise(setup)


def _otherwise(setup: TrainSetup) -> dict[str, str]:
    out = {}
    is_16_bit = setup.weights_dtype != "float32"
    if is_16_bit and setup.autocast:
        out["autocast"] = "DeepSpeed computes 16-bit weights in their own dtype, without autocast"
    if is_16_bit and setup.master_weights == "none" and not _is_pure(setup):
        out["master_weights"] = "DeepSpeed keeps a float32 master copy of 16-bit weights in this combination"
    if setup.optimizer in ADAMW and setup.offload != "none":
        out["optimizer"] = "offloaded states are stepped by DeepSpeed's own CPU AdamW"
    return out
