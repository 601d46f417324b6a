"""TrainSetup's fields as people type them: the one place where text becomes a field's value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from planner.errors import SetupError, nearest_names
from planner.setup import CHOICES, TrainSetup

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Model and data": (
        "model",
        "revision",
        "tokenizer",
        "from_scratch",
        "objective",
        "dpo_beta",
        "data",
        "eval_fraction",
        "eval_batch_size",
    ),
    "Method": (
        "method",
        "rank",
        "alpha",
        "dropout",
        "targets",
        "num_virtual_tokens",
        "init_adapter",
        "adapter_dtype",
        "quant",
        "kbit_upcast",
    ),
    "Precision and optimizer": (
        "weights_dtype",
        "autocast",
        "master_weights",
        "optimizer",
        "optimizer_in_backward",
    ),
    "Batch": ("micro_batch_size", "grad_accum_steps", "seq_len", "packing", "padding_free"),
    "Memory and kernels": ("checkpointing", "attention", "loss", "kernels", "compile", "stack"),
    "Several GPUs": ("num_gpus", "num_nodes", "sharding", "offload"),
    "Schedule": (
        "learning_rate",
        "schedule",
        "warmup_steps",
        "epochs",
        "max_steps",
        "weight_decay",
        "max_grad_norm",
        "seed",
    ),
}
"""The order in which help texts and plan files show the fields."""

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NONE = ("none", "null", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldType:
    """How one field of TrainSetup is written: `kind` is str, int, float, bool, list or model."""

    name: str
    kind: str
    nullable: bool
    choices: tuple[str, ...]
    default: Any
    help: str

    @property
    def option(self) -> str:
        """The command-line option: `--seq-len`."""
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> Any:
        """The value that `text` stands for; raises SetupError naming the field."""
        word = text.strip()
        if self.nullable and word.lower() in _NONE:
            return None
        return _PARSERS[self.kind](self, word)


def _parse_int(field: FieldType, word: str) -> int:
    try:
        return int(word.replace("_", "").replace(",", ""))
    except ValueError:
        raise SetupError(field.name, f"{word!r} is not a whole number") from None


def _parse_float(field: FieldType, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise SetupError(field.name, f"{word!r} is not a number") from None


def _parse_bool(field: FieldType, word: str) -> bool:
    if word.lower() in _TRUE + _FALSE:
        return word.lower() in _TRUE
    raise SetupError(field.name, f"{word!r} is neither true nor false")


def _parse_choice(field: FieldType, word: str) -> str:
    folded = {choice.lower(): choice for choice in field.choices}
    if not folded or word.lower() in folded:
        return folded.get(word.lower(), word)
    raise SetupError(field.name, f"{word!r} is not one of {', '.join(field.choices)}")


def _parse_targets(field: FieldType, word: str) -> str | tuple[str, ...]:
    names = tuple(part.strip() for part in word.strip("[]").split(",") if part.strip())
    if not names:
        raise SetupError(field.name, "is empty: all-linear, or module names with commas between them")
    return names[0] if names == ("all-linear",) else names


_PARSERS = {
    "int": _parse_int,
    "float": _parse_float,
    "bool": _parse_bool,
    "str": _parse_choice,
    "model": _parse_choice,
    "list": _parse_targets,
}

_KINDS = {
    "str": "str",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str | tuple[str, ...]": "list",
    "str | Mapping[str, Any]": "model",
}


def _field_type(field: Field[Any]) -> FieldType:
    annotation = str(field.type)
    choices = CHOICES.get(field.name, ())
    return FieldType(
        name=field.name,
        kind=_KINDS[annotation.removesuffix(" | None")],
        nullable=annotation.endswith(" | None"),
        choices=tuple(c for c in choices if c is not None),
        default=field.default,
        help=str(field.metadata["help"]),
    )


FIELDS: Mapping[str, FieldType] = {f.name: _field_type(f) for f in fields(TrainSetup)}
"""All fields by name, in TrainSetup's order."""


def find_field(name: str) -> FieldType:
    """The field that `name` means (`seq-len` or `seq_len`); SetupError with the nearest names if there is none."""
    key = name.strip().replace("-", "_")
    if key in FIELDS:
        return FIELDS[key]
    nearest = ", ".join(nearest_names(key, FIELDS))
    advice = f"nearest: {nearest}" if nearest else "`finefit plan --help` lists them"
    raise SetupError(name.strip(), f"no such field; {advice}")


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """`("rank=8", "seq-len=512")` as field values; SetupError names what can't be read.

    >>> parse_settings(("rank=8", "seq-len=512", "max-steps=none"))
    {'rank': 8, 'seq_len': 512, 'max_steps': None}
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise SetupError("--set", f"{setting!r} is not key=value")
        field = find_field(name)
        if field.name in values:
            raise SetupError("--set", f"{field.name} is given twice")
        values[field.name] = field.parse(text)
    return values
