"""Names for setups that stand side by side: what tells them apart, and nothing that all share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.fields import FIELDS, SECTIONS
from planner.render import printable
from planner.setup import TrainSetup

_ALWAYS = ("model", "method", "micro_batch_size", "grad_accum_steps", "seq_len")
"""What `describe` says of every setup."""
_QUIET = frozenset(
    [
        "revision",
        "tokenizer",
        "from_scratch",
        "data",
        "eval_fraction",
        "dpo_beta",
        *SECTIONS["Schedule"],
    ]
)
"""Fields that hardly bear on a step's time or memory: named only where nothing else tells two setups apart."""


def differing(setups: Iterable[TrainSetup]) -> tuple[str, ...]:
    """The fields that tell the setups apart, in TrainSetup's order."""
    kept = list(setups)
    values = {name: [repr(getattr(setup, name)) for setup in kept] for name in FIELDS}
    found = tuple(name for name in FIELDS if len(set(values[name])) > 1)
    loud = tuple(name for name in found if name not in _QUIET)
    as_many = {
        names: len(set(zip(*(values[name] for name in names), strict=True))) for names in (found, loud)
    }
    return loud if as_many[loud] == as_many[found] else found


def describe(setup: TrainSetup, differences: Sequence[str] = ()) -> str:
    """Method, model and batch, then whatever else differs: `lora of tiny, 2 x 64 tokens, weights_dtype float32`."""
    accumulated = f" x {setup.grad_accum_steps}" if setup.grad_accum_steps > 1 else ""
    batch = f"{setup.micro_batch_size}{accumulated} x {setup.seq_len} tokens"
    words = [f"{setup.method} of {printable(setup.model_label)}", batch, *describe_rest(setup, differences)]
    return ", ".join(words)


def describe_rest(setup: TrainSetup, differences: Sequence[str]) -> list[str]:
    """The values of fields that differ, but for those that `describe` always says."""
    return [f"{name} {_value(setup, name)}" for name in differences if name not in _ALWAYS]


def _value(setup: TrainSetup, name: str) -> str:
    """A field's value in a few words; of a path its last part."""
    text = printable(str(getattr(setup, name)))
    return text.rpartition("/")[2] if name == "data" else text


def describe_series(setup: TrainSetup, differences: Sequence[str]) -> str:
    """One curve over the length: the batch, after the model and the method where these differ, then the rest."""
    words = [
        *([printable(setup.model_label)] if "model" in differences else []),
        *([setup.method] if "method" in differences else []),
        f"batch {setup.micro_batch_size}"
        + (f" x {setup.grad_accum_steps}" if "grad_accum_steps" in differences else ""),
        *describe_rest(setup, differences),
    ]
    return ", ".join(words)
