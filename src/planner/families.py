"""The families of profiles/models/families.toml: what config.json doesn't say, one entry per model_type."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from planner.errors import NotModelledError, ProfileError, nearest_names
from planner.index import raw_profiles
from planner.setup import CHOICES
from planner.specs import ModelSpec

Family = Mapping[str, Any]
"""An entry of families.toml with everything that it inherits; the file's head explains its keys."""


FAMILIES = "families"
"""The one file of profiles/models that holds families and blocks; every other file holds models."""


def raw_models() -> Mapping[str, Mapping[str, Any]]:
    """The model profiles by file."""
    return {stem: models for stem, models in raw_profiles("models").items() if stem != FAMILIES}


@functools.cache
def model_types() -> tuple[str, ...]:
    """Every model_type that has a family."""
    return tuple(name for name in raw_profiles("models")[FAMILIES]["family"] if name != "base")


@functools.cache
def family(model_type: str) -> Family:
    """The family of a model_type, inherited parts merged in.

    Raises NotModelledError: out of scope by name, or with the nearest families.
    """
    entry: Family | None = raw_profiles("models")[FAMILIES]["family"].get(model_type)
    if entry is None:
        raise NotModelledError(_why_not(model_type))
    parent = entry.get("like")
    return entry if parent is None else merge(family(parent), entry)


def attentions(model: ModelSpec) -> tuple[str, ...]:
    """The attention kernels that today's transformers runs a model with; all where no family says otherwise."""
    entry = {} if model.is_traced else family(model.family)
    return tuple(entry.get("attentions", CHOICES["attention"]))


def takes_attention(model: ModelSpec) -> bool:
    """Whether the model's classes run an attention that is registered with transformers, as finefit's own is."""
    return not (model.is_traced or family(model.family).get("calls_own_attention", False))


def joins_rows(model: ModelSpec) -> bool:
    """Whether finefit can run documents that are joined in one row, each by itself: by its attention, and no layer remembers."""
    if model.architecture != "decoder" or not takes_attention(model):
        return False
    attends = all(layer.mixer == "softmax" for layer in model.layers)
    return attends and not family(model.family).get("chunks_attention", False)


def block(name: str) -> Mapping[str, Any]:
    """A named block of families.toml: its matrices and its `vectors` expression."""
    try:
        found: Mapping[str, Any] = raw_profiles("models")[FAMILIES]["block"][name]
    except KeyError:
        raise ProfileError(f"families.toml: no block {name!r}") from None
    return found


def merge(base: Family, entry: Family) -> Family:
    """`entry` over `base`: tables key by key, anything else replaced."""
    merged = dict(base)
    for key, value in entry.items():
        is_table = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if is_table else value
    return merged


def _why_not(model_type: str) -> str:
    for kind, names in raw_profiles("models")[FAMILIES]["out_of_scope"].items():
        if model_type in names:
            hint = ": the text part can be given as its own config" if kind == "vision-language" else ""
            return f"model_type {model_type!r}: {kind} models are out of scope{hint}"
    near = ", ".join(nearest_names(model_type, model_types())) or ", ".join(model_types()[:6])
    return f"model_type {model_type!r:.60} is not modelled; nearest: {near} (see `finefit list models`)"
