"""TrainSetup -> the model that trains. The trace, the benchmark and the run all build it here.

Nothing in here looks at the value of a tensor, so a model can be built on the meta device and traced with fake
tensors: `build_model(setup, weights=None, meta=True)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bench.remote_code import refuse_code
from planner import hub
from planner.errors import ConfigError, FinefitError, NotModelledError, SetupError
from planner.layers import peft_call
from planner.methods import find_method
from planner.resolve import resolve_model
from planner.setup import TrainSetup
from planner.sharding import STRATEGIES

AUTO_CLASSES = {
    "sft": "AutoModelForCausalLM",
    "pretrain": "AutoModelForCausalLM",
    "dpo": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "seq-cls": "AutoModelForSequenceClassification",
}
"""transformers' class for each objective."""

ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}
"""transformers' name of each attention kernel."""

QUANTISATIONS: dict[str, dict[str, Any]] = {
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {},
}
"""BitsAndBytesConfig's arguments beside load_in_4bit or load_in_8bit and the compute dtype."""

KERNELS = {"fused": "bench.fused", "liger": "bench.liger"}
"""Modules whose `fuse` replaces the forwards of a built model's modules."""


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16` -> torch.bfloat16."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def one_line(error: Exception) -> str:
    """A library's message as part of a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def load_config(setup: TrainSetup, weights: Path | None) -> Any:
    """The model's transformers config: of `weights`, else of the setup's inline config, folder or profile.

    Raises ConfigError where transformers can't read it, or where it needs code that nobody has trusted.
    """
    values = _config_values(setup, weights)
    refuse_code(values, AUTO_CLASSES[setup.objective], setup.model_label)
    try:
        if weights is not None:
            config = transformers.AutoConfig.from_pretrained(
                weights, local_files_only=True, trust_remote_code=False
            )
        else:
            options = {key: value for key, value in values.items() if key != "model_type"}
            config = transformers.AutoConfig.for_model(values["model_type"], **options)
    except (*_BUILD_ERRORS, StrictDataclassError) as error:
        reason = one_line(error)
        raise ConfigError(f"{setup.model_label}: transformers can't read the config: {reason}") from error
    config.use_cache = False
    return config


def _config_values(setup: TrainSetup, weights: Path | None) -> Mapping[str, Any]:
    if weights is not None:
        return hub.read_config(weights / "config.json")
    if isinstance(setup.model, Mapping):
        return setup.model
    # The planner's names and its checks of a config.json hold here too.
    return resolve_model(setup.model, revision=setup.revision).config


def build_model(
    setup: TrainSetup, *, weights: Path | None = None, device: str | torch.device = "cpu", meta: bool = False
) -> nn.Module:
    """The model as it trains: quantised, with its adapters, checkpointed, compiled, in training mode.

    `weights` is a folder with safetensors; None (or `setup.from_scratch`) gives random weights from `setup.seed`.
    `meta` builds shapes only, on the meta device, without compiling; quantised linears then hold bitsandbytes'
    parameters on meta, not yet packed.
    Sets torch's global seed. Raises ConfigError, SetupError (targets, quant) or FinefitError.
    """
    torch.manual_seed(setup.seed)
    config = load_config(setup, weights)
    # A scratch folder may hold a config alone; its weights, if any, are not wanted.
    source = None if setup.from_scratch or meta else weights
    place = torch.device("meta") if meta else torch.device(device)
    is_untied = _config_values(setup, weights).get("tie_word_embeddings") is False
    model = _base_model(setup, config, source, place, meta, is_untied=is_untied)
    if setup.quant:
        _keep_trainable(model)
    if setup.quant and setup.kbit_upcast:
        _upcast_unquantised(model)
    model = add_adapters(setup, model, meta=meta)
    switch_checkpointing(setup, model)
    if setup.kernels in KERNELS and not meta:
        # those modules need this one
        importlib.import_module(KERNELS[setup.kernels]).fuse(model)
    if setup.compile and not meta:
        compile_layers(model)
    return model.train()


def _base_model(
    setup: TrainSetup,
    config: Any,
    source: Path | None,
    device: torch.device,
    meta: bool,
    *,
    is_untied: bool,
) -> nn.Module:
    auto_class = getattr(transformers, AUTO_CLASSES[setup.objective])
    attention = _attention_name(setup, config, auto_class)
    if meta and attention == ATTENTION["flash"]:
        attention = _without_flash(auto_class, config)
    options: dict[str, Any] = {
        "dtype": torch_dtype(setup.weights_dtype),
        "attn_implementation": attention,
        # Without a word, transformers asks on the terminal.
        "trust_remote_code": False,
    }
    try:
        if source is None:
            with device:
                model: nn.Module = auto_class.from_config(config, **options)
                _match_checkpoint(setup, model, is_untied=is_untied)
            return quantise(setup, model, device) if setup.quant else model
        if setup.quant:
            options["quantization_config"] = quantisation_config(setup)
        model = auto_class.from_pretrained(
            source,
            config=config,
            device_map={"": device},
            local_files_only=True,
            use_safetensors=True,
            **options,
        )
    except _BUILD_ERRORS as error:
        raise _build_error(setup, attention, error) from error
    return model


def _attention_name(setup: TrainSetup, config: Any, auto_class: Any) -> str:
    """transformers' name of the setup's attention; finefit's own where rows are joined, or kernels are.

    A model that transformers has no sdpa for (sinks in its softmax) has none of finefit's either.
    """
    is_own = setup.joins_rows or (setup.runs_own_kernels and takes_attention(config))
    if setup.attention != "sdpa" or not is_own or not _supports_sdpa(auto_class, config):
        return ATTENTION[setup.attention]
    from bench.attention import register

    return register(config, setup)


def takes_attention(config: Any) -> bool:
    """Whether transformers' class for the model runs an attention that is registered; some call torch's themselves."""
    model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    return bool(getattr(model_class, "_supports_attention_backend", False))


def _match_checkpoint(setup: TrainSetup, model: Any, *, is_untied: bool) -> None:
    """What from_pretrained makes of a checkpoint and from_config doesn't: T5's own head, and what stays in float32.

    T5's config is always tied; from_pretrained unties the head where the file has a matrix for it, which the
    config.json says (modeling_utils.py, tie_weights).
    """
    head = model.get_output_embeddings()
    if is_untied and head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    wide = model._get_dtype_plan(torch_dtype(setup.weights_dtype))
    for name, parameter in model.named_parameters():
        if model.config.is_encoder_decoder and any(part in name for part in wide):
            parameter.data = parameter.data.float()


def _without_flash(auto_class: Any, config: Any) -> str:
    """An attention in place of a flash kernel that isn't here."""
    return "sdpa" if _supports_sdpa(auto_class, config) else "eager"


def _supports_sdpa(auto_class: Any, config: Any) -> bool:
    model_class = auto_class._model_mapping.get(type(config), None)
    return bool(getattr(model_class, "_supports_sdpa", True))


_BUILD_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    ImportError,
    OSError,
)
"""What transformers raises for a config that its class reads and its layers don't fit."""


def _build_error(setup: TrainSetup, attention: str, error: Exception) -> FinefitError:
    reason = one_line(error)
    if "does not support an attention implementation" in reason:
        return SetupError(
            "attention", f"{setup.model_label}: transformers has no {attention} for it; use eager"
        )
    return FinefitError(f"{setup.model_label}: transformers can't build the model: {reason}")


def quantisation_config(setup: TrainSetup) -> Any:
    """transformers' BitsAndBytesConfig of the setup; 4-bit weights are computed with in `weights_dtype`.

    Where they are split over ranks they are packed in elements of that dtype: FSDP2 splits floating-point tensors only,
    and casts no weight that has the dtype it gathers in.
    """
    assert setup.quant is not None
    options = QUANTISATIONS[setup.quant]
    if setup.quant == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    is_split = STRATEGIES[setup.sharding].shards_weights and setup.num_gpus > 1
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch_dtype(setup.weights_dtype),
        bnb_4bit_quant_storage=torch_dtype(setup.weights_dtype) if is_split else torch.uint8,
        **options,
    )


def quantise(setup: TrainSetup, model: nn.Module, device: torch.device) -> nn.Module:
    """Replace a built model's linears by bitsandbytes' as `from_pretrained` would; on meta, without packing."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    config = quantisation_config(setup)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}
    kept = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    replace_with_bnb_linear(model, kept, config)
    for name, linear in linears.items():
        replaced = model.get_submodule(name)
        if replaced is not linear and device.type != "meta":
            _pack(replaced, linear, device)
    flag = "is_loaded_in_8bit" if setup.quant == "int8" else "is_loaded_in_4bit"
    for attribute in ("is_quantized", flag):
        setattr(model, attribute, True)
    model.config.quantization_config = config
    # Where flash attention asks for the dtype to narrow float32 queries to (quantizers/base.py).
    model.config._is_quantized = True
    return model


def _is_conv1d(module: nn.Module) -> bool:
    return isinstance(module, transformers.pytorch_utils.Conv1D)


def _pack(replaced: Any, linear: Any, device: torch.device) -> None:
    """Quantise `linear`'s weight into the bitsandbytes module that took its place."""
    weight = linear.weight.data.T if _is_conv1d(linear) else linear.weight.data
    empty = replaced.weight
    options = {key: value for key, value in vars(empty).items() if key != "SCB"}
    # Moving to a device is what packs the weight; from_pretrained does the same.
    replaced.weight = type(empty)(weight.contiguous().cpu(), requires_grad=False, **options).to(device)
    if linear.bias is not None:
        replaced.bias = nn.Parameter(linear.bias.data, requires_grad=False)


def _keep_trainable(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights for inference on CPUs with avx512_bf16.

    The first forward in evaluation mode would, for good, and no gradient passes through repacked weights: training
    after an evaluation would leave the layers below untrained, without an error (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _upcast_unquantised(model: nn.Module) -> None:
    """Cast what bitsandbytes left in 16 bits to float32 and freeze everything, as QLoRA's recipe does."""
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def add_adapters(setup: TrainSetup, model: nn.Module, *, meta: bool = False) -> nn.Module:
    """The model wrapped by PEFT with the method's adapters in `adapter_dtype`; unchanged for full training."""
    call = peft_call(setup, lambda: resolve_model(model.config.to_dict(), objective=setup.objective))
    if call is None:
        return model
    import peft

    class_name, options = call
    peft_config = getattr(peft, class_name)(task_type=_TASK_TYPES[setup.objective], **options)
    try:
        wrapped: nn.Module = peft.get_peft_model(
            model,
            peft_config,
            autocast_adapter_dtype=setup.adapter_dtype == "float32",
            low_cpu_mem_usage=meta,
        )
    except ValueError as error:
        raise SetupError("targets", one_line(error)) from error
    frozen = find_method(setup.method).frozen
    # PEFT follows the base weights' dtype, which says nothing when those are packed integers.
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch_dtype(setup.adapter_dtype))
            parameter.requires_grad = not any(part in name for part in frozen)
    return wrapped


_TASK_TYPES = {
    "sft": "CAUSAL_LM",
    "pretrain": "CAUSAL_LM",
    "dpo": "CAUSAL_LM",
    "mlm": "FEATURE_EXTRACTION",
    "seq2seq": "SEQ_2_SEQ_LM",
    "seq-cls": "SEQ_CLS",
}


def inner_model(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def switch_checkpointing(setup: TrainSetup, model: nn.Module) -> None:
    """Recompute each layer in the backward (`full`), without the gradient of the embeddings' output.

    transformers and PEFT ask for that gradient because reentrant checkpointing needs it; this kind doesn't, and
    the first layer's backward is spared. Raises FinefitError where no layer took it: no memory would be saved.
    """
    if setup.checkpointing == "none":
        return
    if setup.checkpointing != "full":
        raise NotModelledError(f"checkpointing: {setup.checkpointing} can't be run yet; use full or none")
    inner = inner_model(model)
    try:
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise FinefitError(f"{setup.model_label}: checkpointing: {one_line(error)}") from error
    inner.disable_input_require_grads()
    if not any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
        raise FinefitError(f"{setup.model_label}: no layer took activation checkpointing")


def compile_layers(model: nn.Module) -> None:
    """torch.compile of each layer for fixed shapes: one graph that all equal layers share."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=False)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; a tied weight once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def drawn_parameters(setup: TrainSetup, model: nn.Module) -> dict[str, nn.Parameter]:
    """All that isn't in the model's own files: what trains, and what its method has drawn and keeps."""
    frozen = find_method(setup.method).frozen
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad or any(part in name for part in frozen)
    }


RUNNABLE = ("sft", "pretrain", "dpo")
"""Objectives that `train` and `bench` have data for."""


def check_runnable(setup: TrainSetup, device: str | torch.device) -> None:
    """Raise SetupError or NotModelledError for what can be planned and traced but not run on such a device."""
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    if setup.objective not in RUNNABLE:
        raise NotModelledError(f"objective: {setup.objective} can't be run yet; {' and '.join(RUNNABLE)} can")
    if setup.kernels == "liger" and not on_cuda:
        raise SetupError("kernels", f"liger needs CUDA, this is {device.type}; use fused or plain")
    if setup.kernels == "fused" and (setup.compile or setup.autocast):
        raise SetupError("kernels", "fused runs without compile and without autocast; use plain")
    if setup.padding_free and setup.compile:
        raise SetupError("padding_free", "compiled layers need rows of one length, and joined ones differ")
    if setup.attention == "flash" and not on_cuda:
        raise SetupError("attention", f"flash needs CUDA, this is {device.type}; use sdpa")
    if setup.loss == "fused" and not on_cuda:
        raise SetupError("loss", f"fused (Liger) needs CUDA, this is {device.type}; use chunked")
    if setup.weights_dtype == "float16" and not setup.uses_adapters:
        raise SetupError("weights_dtype", "float16 weights can't be trained; use bfloat16 or float32")
    if setup.uses_adapters and setup.adapter_dtype == "float16":
        raise SetupError("adapter_dtype", "float16 adapters can't be trained; use float32 or bfloat16")
    if setup.optimizer_in_backward and "float16" in (setup.autocast, setup.weights_dtype):
        raise SetupError("optimizer_in_backward", "float16's loss scaling needs all gradients at once")
