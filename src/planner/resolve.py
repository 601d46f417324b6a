"""What a user calls a model -> ModelSpec: a profile's name, a folder, a config.json, a mapping, a hub id."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner import hub
from planner.coefficients import traced_model
from planner.errors import ConfigError, NotModelledError, UnknownNameError, fold_name
from planner.families import raw_models
from planner.hf_config import model_spec
from planner.specs import ModelSpec

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LONGEST_NAME = 100
_TEXT_FACTS = ("license", "commercial", "source", "note")


def resolve_model(
    model: str | Mapping[str, Any],
    *,
    revision: str | None = None,
    offline: bool = True,
    experts_as_linears: bool = False,
    objective: str | None = None,
) -> ModelSpec:
    """The shapes of `model`: an inline config.json, a folder, a file, a profile name, or a hub id.

    Case, blanks and hyphens don't matter in names. A hub id that no profile knows is looked up in the local
    Hugging Face cache and, unless `offline`, on the hub (`revision` applies to these two).
    `experts_as_linears` and `objective` are model_spec's.
    Raises UnknownNameError with the nearest names, ConfigError, NotModelledError, or FinefitError when the
    hub can't be reached.
    """
    build = functools.partial(_build, experts_as_linears=experts_as_linears, objective=objective)
    if isinstance(model, Mapping):
        return build(model, where="inline config")
    file = _config_file(model)
    if file is not None:
        return build(hub.read_config(file), name=_folder_name(file), where=str(file))
    entry = _index().get(fold_name(model))
    if entry is not None:
        return profile_spec(*entry, experts_as_linears=experts_as_linears, objective=objective)
    is_hub_id = _HUB_ID.fullmatch(model) is not None
    cached = hub.cached_config(model, revision) if is_hub_id else None
    if cached is not None:
        return build(hub.read_config(cached), name=model, hub_id=model, where=str(cached))
    if offline or not is_hub_id:
        raise UnknownNameError("model", model[:_LONGEST_NAME], model_names())
    config = hub.fetch_config(model, revision)
    return build(config, name=model, hub_id=model, where=hub.config_url(model, revision))


def _build(config: Mapping[str, Any], *, name: str | None = None, **facts: Any) -> ModelSpec:
    """By the families' rules; an architecture without any by what was traced of it."""
    try:
        return model_spec(config, name=name, **facts)
    except NotModelledError as error:
        found = traced_model(config, name)
        if found is None:
            hint = "if transformers can build it, `finefit estimate … --trace` learns it once"
            raise NotModelledError(f"{error}; {hint}") from error
        return found


def read_config(model: str | Mapping[str, Any], *, revision: str | None = None) -> Mapping[str, Any]:
    """The config.json of `model`, whatever its architecture, from this machine. Raises as resolve_model does."""
    if isinstance(model, Mapping):
        return model
    file = _config_file(model)
    if file is None and fold_name(model) not in _index() and _HUB_ID.fullmatch(model):
        file = hub.cached_config(model, revision)
    return resolve_model(model, revision=revision).config if file is None else hub.read_config(file)


def model_names(*, featured: bool = False) -> list[str]:
    """The profiles' own names, those that tables show by default or all; variants, which differ only in training, not."""
    return [name for name, entry in profiles() if entry.get("featured") or not featured]


def is_known(name: str) -> bool:
    """Whether a name, in any spelling, is that of a profile or of one of its variants."""
    return fold_name(name) in _index()


def profiles() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every model profile as (name, entry), in the files' order."""
    for models in raw_models().values():
        yield from models.items()


@functools.cache
def profile_spec(
    name: str, hub_id: str | None = None, *, experts_as_linears: bool = False, objective: str | None = None
) -> ModelSpec:
    """The shapes of the profile `name`; `hub_id` picks one of its variants (default: the profile's own)."""
    entry = _entries()[name]
    spec = model_spec(
        profile_config(entry),
        name=hub_id.rpartition("/")[2] if hub_id else name,
        hub_id=hub_id or entry.get("hub_id"),
        where=f"profiles/models: {name}",
        experts_as_linears=experts_as_linears,
        objective=objective,
    )
    facts: dict[str, Any] = {key: entry.get(key) for key in _TEXT_FACTS}
    return replace(spec, remote_code=spec.remote_code or bool(entry.get("remote_code")), **facts)


def profile_config(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of a profile's entry; `null_keys` stand for the nulls that TOML doesn't have."""
    nulls = entry.get("null_keys")
    config: Mapping[str, Any] = entry["config"]
    return {**config, **dict.fromkeys(nulls)} if nulls else config


@functools.cache
def _entries() -> dict[str, Mapping[str, Any]]:
    return dict(profiles())


@functools.cache
def _index() -> dict[str, tuple[str, str | None]]:
    """Folded name -> (profile, hub id of the variant or None); a profile's own names win over variants."""
    index: dict[str, tuple[str, str | None]] = {}
    for name, entry in profiles():
        for known in (name, *_both_names(entry.get("hub_id")), *entry.get("aliases", ())):
            index.setdefault(fold_name(known), (name, None))
    for name, entry in profiles():
        for variant in entry.get("variants", ()):
            for known in _both_names(variant):
                index.setdefault(fold_name(known), (name, variant))
    return index


def _both_names(hub_id: str | None) -> tuple[str, ...]:
    return () if hub_id is None else (hub_id, hub_id.rpartition("/")[2])


def _config_file(model: str) -> Path | None:
    """The config.json that `model` points at as a folder or a file; None when it is no path."""
    if not model or "\0" in model or len(model) > 4096:
        return None
    path = Path(model).expanduser()
    try:
        if path.is_file():
            return path
        if not path.is_dir():
            return _missing_path(model)
        if (path / "config.json").is_file():
            return path / "config.json"
    except OSError:
        return None
    if fold_name(model) in _index() or hub.cached_config(model, None):
        return None
    raise ConfigError(f"folder {model} has no config.json")


def _missing_path(model: str) -> Path | None:
    if model.endswith(".json") or model.startswith(("./", "../", "/", "~")):
        raise ConfigError(f"{model}: no such file or folder")
    return None


def _folder_name(config_file: Path) -> str:
    return config_file.resolve().parent.name if config_file.name == "config.json" else config_file.stem
