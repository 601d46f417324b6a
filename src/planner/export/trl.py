"""TRL: a train.py with its SFTConfig or DPOConfig, and what `accelerate launch` needs where several GPUs share the work.

Checked against trl 1.16 (trl/trainer/{sft,dpo}_config.py and {sft,dpo}_trainer.py), transformers 5.23, peft 0.21.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.errors import FinefitError, SetupError, UnknownNameError
from planner.export import _trl_script as script
from planner.export import accelerate, by_reason, deepspeed
from planner.export._trl_trainers import TRAINERS
from planner.layers import peft_call
from planner.methods import PeftCall, find_method, peak_learning_rate
from planner.optimizers import find_optimizer
from planner.recipes import WARMUP_SHARE
from planner.resolve import resolve_model
from planner.setup import TrainSetup
from planner.specs import ModelSpec

SUMMARY = (
    "train.py and its config for TRL's SFTTrainer or DPOTrainer (with accelerate's file for several GPUs)"
)

ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}
"""Our attention -> transformers' attn_implementation."""

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Our schedule -> Trainer's lr_scheduler_type; its `constant` would ignore the warm-up."""

QUANTISATIONS: dict[str, dict[str, Any]] = {
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}
"""Our quant -> BitsAndBytesConfig's arguments."""

_CONFIG_HEADER = "# Made by finefit for train.py: the arguments of trl."
_FALLBACK_OPTIMIZER = "adamw_torch_fused"


def export(setup: TrainSetup, gpu: str) -> dict[str, str]:
    """train.py, its trainer's config and, for several processes, accelerate's files.

    Raises SetupError for an objective that has no trainer here, without data, and for an inline config (it has no
    weights and no tokenizer).
    """
    import yaml

    _check(setup)
    trainer = TRAINERS[setup.objective]
    header = f"{_CONFIG_HEADER}{trainer.config}\n"
    files = {
        "train.py": _train_script(setup),
        trainer.config_file: header + yaml.safe_dump(trainer_config(setup), sort_keys=False),
    }
    return files | (accelerate.export(setup, gpu) if needs_launcher(setup) else {})


def needs_launcher(setup: TrainSetup) -> bool:
    """Whether the script must be started by `accelerate launch`."""
    return setup.sharding not in ("none", "device_map")


def _check(setup: TrainSetup) -> None:
    if setup.objective not in TRAINERS:
        raise SetupError(
            "objective", f"{setup.objective} is not exported to TRL; {' and '.join(TRAINERS)} are"
        )
    if not setup.data:
        raise SetupError("data", "the script needs a file, a folder or a hub data set to train on")
    if not isinstance(setup.model, str) or not setup.model:
        raise SetupError(
            "model", "an inline config has no weights and no tokenizer; name a model or a folder"
        )
    if setup.from_scratch and setup.quant:
        raise SetupError(
            "from_scratch", "random weights are not worth quantising; choose method lora or full"
        )


def trainer_config(setup: TrainSetup) -> dict[str, Any]:
    """The config's arguments: all that the setup says, and nothing left to defaults that differ from it."""
    return {
        "output_dir": "trl-output",
        **_precision(setup),
        **_batches(setup),
        **_schedule(setup),
        "optim": find_optimizer(setup.optimizer).hf_name or _FALLBACK_OPTIMIZER,
        **_checkpointing(setup),
        **TRAINERS[setup.objective].arguments(setup),
        "use_liger_kernel": setup.kernels == "liger",
        "torch_compile": setup.compile,
        "seed": setup.seed,
        "eval_strategy": "epoch" if setup.eval_fraction else "no",
        "save_strategy": "epoch",
        "logging_steps": 1,
        "report_to": "none",
    }


def _precision(setup: TrainSetup) -> dict[str, bool]:
    """bf16 and fp16 mean autocast, but under DeepSpeed they mean its own 16-bit mode and must repeat its file."""
    if accelerate.uses_deepspeed(setup):
        sections = deepspeed.precision(setup)
        return {"bf16": "bf16" in sections, "fp16": "fp16" in sections}
    return {"bf16": setup.autocast == "bfloat16", "fp16": setup.autocast == "float16"}


def _batches(setup: TrainSetup) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": setup.micro_batch_size,
        "per_device_eval_batch_size": setup.eval_batch_size or setup.micro_batch_size,
        "gradient_accumulation_steps": setup.grad_accum_steps,
        "max_length": setup.seq_len,
    }


def _schedule(setup: TrainSetup) -> dict[str, Any]:
    return {
        "learning_rate": peak_learning_rate(setup),
        "lr_scheduler_type": SCHEDULES[setup.schedule],
        # Trainer takes a value below 1 as a share of the run.
        "warmup_steps": WARMUP_SHARE if setup.warmup_steps is None else setup.warmup_steps,
        "num_train_epochs": setup.epochs,
        "max_steps": setup.max_steps or -1,
        "weight_decay": setup.weight_decay,
        # 0 switches clipping off
        "max_grad_norm": setup.max_grad_norm or 0.0,
    }


def _checkpointing(setup: TrainSetup) -> dict[str, Any]:
    if setup.checkpointing == "none":
        return {"activation_checkpointing": False}
    return {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    }


def _train_script(setup: TrainSetup) -> str:
    call = peft_call(setup, lambda: _open_model(setup))
    trainer = TRAINERS[setup.objective]
    parts = [
        script.HEAD.format(
            what=trainer.what,
            config_file=trainer.config_file,
            start=_start(setup),
            imports=_imports(setup, call),
        ),
        _constants(setup, call),
        script.READ_TABLE,
        trainer.rows,
        script.TEMPLATE if trainer.is_chat else "",
        script.SPLIT if setup.eval_fraction else "",
        script.LOAD_MODEL.format(body=_load_model_body(setup, call)),
        _main(setup),
    ]
    return "\n\n".join(part for part in parts if part)


def _open_model(setup: TrainSetup) -> ModelSpec:
    return resolve_model(setup.model, revision=setup.revision, objective=setup.objective)


def _start(setup: TrainSetup) -> str:
    launcher = (
        f"accelerate launch --config_file {accelerate.FILE_NAME}" if needs_launcher(setup) else "python"
    )
    return f"{launcher} train.py"


def _imports(setup: TrainSetup, call: PeftCall | None) -> str:
    trainer = TRAINERS[setup.objective]
    needs_sys = setup.objective == "sft" or setup.sharding == "device_map"
    needs_torch = _casts_adapters(setup) or setup.sharding == "device_map"
    names = ["AutoModelForCausalLM", "AutoTokenizer", "set_seed"]
    names += ["BitsAndBytesConfig"] if setup.quant else []
    names += ["AutoConfig"] if setup.from_scratch else []
    peft_names = [call[0], "get_peft_model"] if call else []
    peft_names += ["prepare_model_for_kbit_training"] if setup.quant and setup.kbit_upcast else []
    lines = [
        "import sys" if needs_sys else "",
        "from pathlib import Path\n",
        "import torch" if needs_torch else "",
        "import yaml",
        "from datasets import load_dataset",
        f"from peft import {', '.join(sorted(peft_names))}" if peft_names else "",
        f"from transformers import {', '.join(sorted(names))}",
        f"from trl import {trainer.config}, {trainer.trainer}",
    ]
    return "\n".join(line for line in lines if line)


def _constants(setup: TrainSetup, call: PeftCall | None) -> str:
    """All that the user chose, as literals: `repr` is what keeps a name from becoming program text."""
    model = model_reference(setup)
    values: dict[str, Any] = {
        "MODEL": model,
        "REVISION": setup.revision,
        "MODEL_OPTIONS": _model_options(setup),
        "TOKENIZER": setup.tokenizer or model,
        "TOKENIZER_REVISION": None if setup.tokenizer else setup.revision,
        "DATA": setup.data,
        "SEED": setup.seed,
    }
    values |= {"EVAL_FRACTION": setup.eval_fraction} if setup.eval_fraction else {}
    values |= {"QUANTISATION": quantisation(setup)} if setup.quant else {}
    values |= {"ADAPTER": call[1]} if call else {}
    values |= {"PLAIN_TEMPLATE": script.PLAIN_TEMPLATE} if TRAINERS[setup.objective].is_chat else {}
    values |= {"NUM_GPUS": setup.num_gpus} if setup.sharding == "device_map" else {}
    notes = [f"#   {', '.join(names)}: {why}" for why, names in by_reason(left_out(setup)).items()]
    notes = ["# What this script does otherwise than planned:", *notes] if notes else []
    return "\n".join([*notes, *(f"{name} = {value!r}" for name, value in values.items())]) + "\n"


def model_reference(setup: TrainSetup) -> str:
    """What `from_pretrained` is given: a folder as it is, else the hub id of the name. Raises UnknownNameError."""
    name = str(setup.model)
    path = Path(name).expanduser()
    if path.is_file():
        return str(path.parent)
    if path.is_dir():
        return name
    try:
        return resolve_model(name, revision=setup.revision).hub_id or name
    except UnknownNameError:
        # A hub id needs no profile here: transformers downloads it.
        if "/" in name:
            return name
        raise


def _model_options(setup: TrainSetup) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": setup.weights_dtype,
        "attn_implementation": ATTENTION[setup.attention],
    }
    options |= {} if setup.from_scratch else {"revision": setup.revision}
    options |= {"device_map": "balanced"} if setup.sharding == "device_map" else {}
    return options


def quantisation(setup: TrainSetup) -> dict[str, Any]:
    """BitsAndBytesConfig's arguments; 4-bit weights are computed with in `weights_dtype`."""
    assert setup.quant is not None
    options = dict(QUANTISATIONS[setup.quant])
    if setup.quant == "int8":
        return options
    options["bnb_4bit_compute_dtype"] = setup.weights_dtype
    if setup.sharding in ("fsdp", "fsdp1"):
        # FSDP can only shard packed weights that are stored in the dtype of the other ones.
        options["bnb_4bit_quant_storage"] = setup.weights_dtype
    return options


def _casts_adapters(setup: TrainSetup) -> bool:
    """Under ZeRO-3 adapters must have the base's dtype (TRL #6089), and each GPU holds a part of each."""
    return setup.uses_adapters and setup.sharding != "zero3"


def _load_model_body(setup: TrainSetup, call: PeftCall | None) -> str:
    body = script.RANDOM if setup.from_scratch else script.QUANTISED if setup.quant else script.PRETRAINED
    if setup.quant and setup.kbit_upcast:
        body += script.KBIT_UPCAST
    if call:
        autocast = _casts_adapters(setup) and setup.adapter_dtype == "float32"
        body += script.ADAPTERS.format(peft_class=call[0], autocast=autocast)
    if _casts_adapters(setup):
        body += script.ADAPTER_CAST.format(dtype=setup.adapter_dtype)
    frozen = find_method(setup.method).frozen
    return body + (script.FREEZE.format(parts=frozen) if frozen else "")


def _main(setup: TrainSetup) -> str:
    trainer = TRAINERS[setup.objective]
    return script.MAIN.format(
        config=trainer.config,
        config_file=trainer.config_file,
        trainer=trainer.trainer,
        gpu_check=script.GPU_CHECK if setup.sharding == "device_map" else "",
        template="    give_template(tokenizer)\n" if trainer.is_chat else "",
        rows="split(load_rows())" if setup.eval_fraction else "load_rows(), None",
    )


def left_out(setup: TrainSetup) -> dict[str, str]:
    """The fields that TRL can't express or does in its own way, and those that its launcher does."""
    out = {name: why for name, (applies, why) in _OTHERWISE.items() if applies(setup)}
    if not needs_launcher(setup):
        return out
    launcher = accelerate.left_out(setup)
    shared = ("num_gpus", "num_nodes", "sharding", "offload", "autocast", "weights_dtype", "master_weights")
    own = (accelerate.SCRIPT, deepspeed.SCRIPT)
    return out | {name: launcher[name] for name in shared if launcher.get(name, own[0]) not in own}


_OTHERWISE: dict[str, tuple[Callable[[TrainSetup], bool], str]] = {
    "init_adapter": (
        lambda s: s.init_adapter is not None,
        "the script begins with a new adapter; load the earlier one with PeftModel.from_pretrained(is_trainable=True)",
    ),
    "loss": (
        lambda s: s.loss != "chunked",
        "TRL always computes the loss in chunks, without all logits at once",
    ),
    "kernels": (
        lambda s: s.kernels != "plain",
        "TRL can use Liger's layer kernels only, with its own chunked loss; what it needs without these is what "
        "`finefit estimate` says of the plan with --kernels plain",
    ),
    "compile": (lambda s: s.compile, "Trainer compiles the whole model, not each layer"),
    "optimizer": (
        lambda s: find_optimizer(s.optimizer).hf_name is None,
        f"Trainer has no such optimizer; the file says {_FALLBACK_OPTIMIZER}",
    ),
    "optimizer_in_backward": (
        lambda s: s.optimizer_in_backward,
        "Trainer steps after the backward; all gradients stay until then",
    ),
    "checkpointing": (
        lambda s: s.checkpointing == "selective",
        "written as full: what TRL calls selective is another choice of operations",
    ),
    "padding_free": (
        lambda s: s.padding_free != s.packing,
        "TRL is padding-free exactly where it packs",
    ),
    "adapter_dtype": (
        lambda s: (s.quant is not None and s.adapter_dtype != "bfloat16") or _follows_base(s),
        "TRL casts the adapters to bfloat16 beside quantised weights, and ZeRO-3 to the base's dtype",
    ),
    "master_weights": (
        lambda s: s.master_weights != "none" and not accelerate.uses_deepspeed(s),
        "Trainer keeps no master copy; train float32 weights under autocast instead",
    ),
    "model": (
        lambda s: _needs_remote_code(s),
        "it brings code of its own; from_pretrained refuses it unless you add trust_remote_code=True",
    ),
    "dpo_beta": (lambda s: s.objective != "dpo", "only DPO has one"),
    "stack": (lambda s: s.stack is not None, "the script runs with the installed versions"),
}


def _needs_remote_code(setup: TrainSetup) -> bool:
    try:
        return resolve_model(setup.model, revision=setup.revision).remote_code
    except FinefitError:
        # Nothing is known of a model that no profile and no cache has.
        return False


def _follows_base(setup: TrainSetup) -> bool:
    return setup.uses_adapters and setup.sharding == "zero3" and setup.adapter_dtype != setup.weights_dtype
