"""TrainSetup: one fine-tuning configuration. Its field names are the CLI's options, plan.yaml's keys and
the keys of evidence cases; the estimate, the trace, the exports, the benchmark and the run all read it.

Only what can be judged from the setup alone is checked here; what depends on the model or the machine
(bf16 on Turing, targets that match no module) is in `planner.checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from planner.errors import SetupError, nearest_names

CHOICES: dict[str, tuple[Any, ...]] = {
    "objective": ("sft", "pretrain", "dpo", "mlm", "seq2seq", "seq-cls"),
    "adapter_dtype": ("float32", "bfloat16", "float16"),
    "quant": ("nf4-double", "nf4", "fp4", "int8"),
    "weights_dtype": ("bfloat16", "float16", "float32"),
    "autocast": (None, "bfloat16", "float16"),
    "master_weights": ("none", "float32"),
    "checkpointing": ("full", "none", "selective"),
    "attention": ("sdpa", "flash", "eager"),
    "loss": ("full", "chunked", "fused"),
    "kernels": ("plain", "fused", "liger"),
    "sharding": ("none", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1", "device_map"),
    "offload": ("none", "optimizer", "params+optimizer"),
    "schedule": ("cosine", "linear", "constant"),
}
"""The legal values of the fields that are a closed choice; methods and optimizers are registries."""


PAIRED = ("dpo",)
"""Objectives that learn from two answers to each prompt."""
SEQUENCES_PER_ROW = dict.fromkeys(PAIRED, 2)
"""By objective; 1 for those that aren't here."""


def _doc(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSetup:
    """One configuration of one run. Sizes of batches count sequences per GPU (pairs, where there are pairs of answers),
    lengths count tokens.

    Raises SetupError (exit 2) naming the field when a value is illegal or contradicts another.
    """

    model: str | Mapping[str, Any] = _doc("profile name, folder, hub id, or an inline config.json", "")
    objective: str = _doc("what is learned", "sft")
    dpo_beta: float = _doc("how much a preference weighs against staying near the first model (DPO)", 0.1)
    revision: str | None = _doc("revision of the hub model", None)
    tokenizer: str | None = _doc("tokenizer name or folder, where the model brings none", None)
    from_scratch: bool = _doc("start from seeded random weights", False)
    data: str | None = _doc("training file, folder or hub dataset org/name:split", None)
    eval_fraction: float = _doc("share of the rows held out for evaluation", 0.05)
    eval_batch_size: int | None = _doc("sequences per GPU in evaluation (default: micro_batch_size)", None)
    method: str = _doc("fine-tuning method", "lora")
    rank: int = _doc("rank of the adapters", 16)
    alpha: float = _doc("scale of the adapters (alpha / rank)", 32)
    dropout: float = _doc("dropout before the adapters", 0.0)
    targets: str | tuple[str, ...] = _doc("module names that get adapters, or all-linear", "all-linear")
    num_virtual_tokens: int = _doc("learned tokens ahead of each row (methods prompt and prefix)", 100)
    init_adapter: str | None = _doc("earlier run's adapter to go on from", None)
    adapter_dtype: str = _doc("dtype of the adapters (PEFT's default is float32)", "float32")
    quant: str | None = _doc("quantisation of the frozen weights (qlora only)", None)
    kbit_upcast: bool = _doc("cast the 16-bit weights that stay unquantised to float32 (qlora only)", False)
    weights_dtype: str = _doc("dtype of the weights", "bfloat16")
    autocast: str | None = _doc("autocast dtype of the forward pass", None)
    master_weights: str = _doc("extra master copy of the trained weights", "none")
    optimizer: str = _doc("optimizer", "adamw")
    micro_batch_size: int = _doc("sequences per GPU and forward pass", 1)
    grad_accum_steps: int = _doc("forward passes per optimizer step", 1)
    seq_len: int = _doc("tokens per sequence; of an encoder-decoder, of source and target each", 2048)
    packing: bool = _doc("several rows per sequence, isolated from each other", False)
    padding_free: bool = _doc("no padding: rows concatenated without gaps", False)
    checkpointing: str = _doc("activation checkpointing", "full")
    optimizer_in_backward: bool = _doc("step and free each gradient in the backward", False)
    attention: str = _doc("attention kernel", "sdpa")
    loss: str = _doc("full logits, chunked, or fused with the head", "full")
    kernels: str = _doc(
        "plain torch's, fused (finefit's own; Triton's of a named stack), or Liger's", "plain"
    )
    compile: bool = _doc("torch.compile of each layer", False)
    stack: str | None = _doc("versions whose behaviour is predicted (default: the newest known)", None)
    num_gpus: int = _doc("GPUs of all nodes together", 1)
    num_nodes: int = _doc("machines", 1)
    sharding: str = _doc("how several GPUs share the work", "none")
    offload: str = _doc("what is kept in host memory", "none")
    learning_rate: float | None = _doc("peak learning rate (default: by method)", None)
    schedule: str = _doc("learning-rate schedule after the warm-up", "cosine")
    warmup_steps: int | None = _doc("optimizer steps of linear warm-up (default: 3 % of the run)", None)
    epochs: float = _doc("passes over the data", 1.0)
    max_steps: int | None = _doc("optimizer steps (overrides epochs)", None)
    weight_decay: float = _doc("AdamW's weight decay", 0.0)
    max_grad_norm: float | None = _doc("gradient clipping by norm", 1.0)
    seed: int = _doc("seed of everything random", 42)

    def __post_init__(self) -> None:
        """Normalise lists to tuples, fill what one field implies of another, then check."""
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.method == "qlora" and self.quant is None:
            object.__setattr__(self, "quant", "nf4-double")
        _check_types(self)
        _check_values(self)
        _check_combinations(self)

    def with_(self, **changes: Any) -> TrainSetup:
        """A copy with some fields changed; checks again."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; `from_dict` reads them back to an equal setup."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.targets, tuple):
            plain["targets"] = list(self.targets)
        if isinstance(self.model, Mapping):
            plain["model"] = dict(self.model)
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSetup:
        """A setup from plan.yaml's or a case's keys; an unknown key is a SetupError with the nearest names."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                nearest = ", ".join(nearest_names(str(key), known)) or "see `finefit plan --help`"
                shown = key if isinstance(key, str) and key.isprintable() else repr(key)
                raise SetupError(shown, f"no such field; nearest: {nearest}")
        return cls(**values)

    @property
    def sequences_per_row(self) -> int:
        """Sequences that the model reads for one row of the data: of a pair of answers, both conversations."""
        return SEQUENCES_PER_ROW.get(self.objective, 1)

    @property
    def eval_sequences(self) -> int | None:
        """Sequences of an evaluation's batch; None where they are those of a micro-batch."""
        return None if self.eval_batch_size is None else self.eval_batch_size * self.sequences_per_row

    @property
    def tokens_per_micro_batch(self) -> int:
        """Token positions (padding included) in one forward pass of one GPU."""
        return self.micro_batch_size * self.sequences_per_row * self.seq_len

    @property
    def global_batch_size(self) -> int:
        """Sequences, or pairs, per optimizer step over all GPUs."""
        ranks = 1 if self.sharding == "device_map" else self.num_gpus
        return self.micro_batch_size * self.grad_accum_steps * ranks

    @property
    def joins_rows(self) -> bool:
        """Whether a micro-batch is one row of all its documents, which attend to themselves alone; the collator of a named
        stack has its own ways.
        """
        return self.padding_free and self.stack is None

    @property
    def runs_own_kernels(self) -> bool:
        """Whether the fused kernels are finefit's own (bench.fused); those of a named stack are Triton's."""
        return self.kernels == "fused" and self.stack is None

    @property
    def global_batch_text(self) -> str:
        """The same in words: `16 sequences`, `1 pair`."""
        name = "pair" if self.objective in PAIRED else "sequence"
        return f"{self.global_batch_size} {name}{'' if self.global_batch_size == 1 else 's'}"

    @property
    def uses_adapters(self) -> bool:
        """Whether the model's own weights stay frozen."""
        return self.method != "full"

    @property
    def model_label(self) -> str:
        """The model as one would print it."""
        if isinstance(self.model, str):
            return self.model
        return str(self.model.get("_name_or_path") or self.model.get("model_type") or "inline config")


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "bool": (bool,),
    "str | tuple[str, ...]": (str, tuple),
    "str | Mapping[str, Any]": (str, Mapping),
}


def _check_types(setup: TrainSetup) -> None:
    for f in fields(setup):
        value = getattr(setup, f.name)
        allowed = _TYPES[str(f.type)]
        is_wrong_bool = isinstance(value, bool) and bool not in allowed
        if not isinstance(value, allowed) or is_wrong_bool:
            raise SetupError(f.name, f"{value!r} is not a {str(f.type).split(' | ')[0]}")


def _check_values(setup: TrainSetup) -> None:
    for name, choices in CHOICES.items():
        value = getattr(setup, name)
        unset_quant = name == "quant" and value is None
        if value not in choices and not unset_quant:
            raise SetupError(name, f"{value!r} is not one of {', '.join(map(str, choices))}")
    for name, low, high in _RANGES:
        value = getattr(setup, name)
        if value is not None and not low <= value <= high:
            raise SetupError(name, f"{value} is outside {low:g} to {high:g}")
    is_list = isinstance(setup.targets, tuple)
    if not setup.targets or (is_list and not all(isinstance(t, str) and t for t in setup.targets)):
        raise SetupError("targets", "must be all-linear or a list of module names")


_RANGES = (
    ("eval_fraction", 0.0, 0.9),
    ("dpo_beta", 1e-6, 1e6),
    ("dropout", 0.0, 0.99),
    ("alpha", 1e-6, 1e6),
    ("rank", 1, 65_536),
    ("num_virtual_tokens", 1, 65_536),
    ("seq_len", 1, 16_777_216),
    ("micro_batch_size", 1, 1_048_576),
    ("grad_accum_steps", 1, 1_048_576),
    ("num_gpus", 1, 65_536),
    ("num_nodes", 1, 65_536),
    ("max_steps", 1, 1e12),
    ("eval_batch_size", 1, 1_048_576),
    ("epochs", 1e-9, 1e6),
    ("learning_rate", 1e-12, 100.0),
    ("weight_decay", 0.0, 10.0),
    ("max_grad_norm", 1e-9, 1e9),
    ("warmup_steps", 0, 1e9),
    ("seed", 0, 2**32 - 1),
)


def _check_combinations(setup: TrainSetup) -> None:
    for field_name, is_wrong, message in _CONTRADICTIONS:
        if is_wrong(setup):
            raise SetupError(field_name, message)


_CONTRADICTIONS: tuple[tuple[str, Any, str], ...] = (
    (
        "init_adapter",
        lambda s: s.init_adapter is not None and not s.uses_adapters,
        "full fine-tuning has no adapter to go on from; name the earlier run's model/ as the model",
    ),
    ("quant", lambda s: s.quant and s.method != "qlora", "only method qlora quantises the frozen weights"),
    (
        "sharding",
        lambda s: s.method == "qlora" and s.sharding == "zero3",
        "ZeRO-3 loads the whole quantised model on each GPU (bitsandbytes#1249); use fsdp or ddp",
    ),
    (
        "sharding",
        lambda s: (
            s.num_gpus == 1 and s.sharding not in ("none", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1")
        ),
        "a layer split needs num_gpus of at least 2",
    ),
    (
        "sharding",
        lambda s: s.num_gpus > 1 and s.sharding == "none",
        "num_gpus > 1 needs a strategy: ddp, fsdp, zero1, zero2, zero3 or device_map",
    ),
    ("num_nodes", lambda s: s.num_gpus % s.num_nodes != 0, "num_gpus must be a multiple of num_nodes"),
    (
        "offload",
        lambda s: s.offload != "none" and s.sharding not in ("zero1", "zero2", "zero3", "fsdp", "fsdp1"),
        "needs a sharding that can offload: zero1, zero2, zero3, fsdp or fsdp1",
    ),
    (
        "offload",
        lambda s: s.offload == "params+optimizer" and s.sharding in ("zero1", "zero2"),
        "only zero3, fsdp and fsdp1 can offload parameters",
    ),
    (
        "packing",
        lambda s: s.packing and s.attention == "eager" and s.padding_free,
        "padding-free rows need sdpa or flash attention; eager would build the whole mask",
    ),
    (
        "padding_free",
        lambda s: s.padding_free and s.attention == "eager",
        "needs sdpa or flash attention",
    ),
    (
        "packing",
        lambda s: s.packing and s.objective in ("mlm", "seq2seq", "seq-cls", "dpo"),
        "rows can be packed only for objectives sft and pretrain",
    ),
    (
        "padding_free",
        lambda s: s.padding_free and s.objective in PAIRED,
        "each answer of a pair stands in a row of its own",
    ),
    (
        "loss",
        lambda s: s.loss == "fused" and s.objective == "dpo",
        "fused gives no log probability of a whole answer; use chunked",
    ),
    (
        "optimizer_in_backward",
        lambda s: s.optimizer_in_backward and s.grad_accum_steps > 1,
        "each gradient is freed in the backward, so grad_accum_steps must be 1",
    ),
    (
        "optimizer_in_backward",
        lambda s: s.optimizer_in_backward and s.sharding not in ("none",),
        "works on one GPU only",
    ),
    (
        "master_weights",
        lambda s: s.master_weights != "none" and s.weights_dtype == "float32",
        "the weights are float32 already",
    ),
)
