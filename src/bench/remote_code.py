"""Code that a model brings along (`auto_map` in its config.json): never run unless the person who starts the command says so.

`--trust-remote-code` is a flag of commands and no field of a setup, so that no plan file can switch it on. What it
does is to import the model's classes and make them known to transformers, for as long as this process lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from planner.errors import ConfigError, FinefitError
from planner.families import family as family_of
from planner.families import model_types
from planner.resolve import read_config, resolve_model
from planner.setup import TrainSetup

FLAG = "--trust-remote-code"


def refuse_code(config: Mapping[str, Any], auto_class: str, label: str) -> None:
    """Raise ConfigError where `config` can be built only by code of its own, which nobody has trusted."""
    model_type = config.get("model_type")
    is_there = model_type in CONFIG_MAPPING and _has_model(CONFIG_MAPPING[model_type], auto_class)
    if _brings_code(config, auto_class) and not is_there:
        raise ConfigError(
            f"{label}: needs code of its own (auto_map), which is not run: transformers {transformers.__version__} "
            f"has no {auto_class} of model_type {model_type!r:.60}; where you have read it, {FLAG} runs it"
        )


def trust_code(setup: TrainSetup, auto_class: str) -> None:
    """Import the code that the setup's model needs and register its classes with transformers.

    RUNS THE MODEL'S OWN CODE. Nothing happens where transformers has the model itself. Raises ConfigError where there is no folder
    or hub id to take the code from, FinefitError where it can't be imported.
    """
    config = read_config(setup.model, revision=setup.revision)
    if not _brings_code(config, auto_class):
        return
    source = _source(setup)
    try:
        _register(source, setup.revision, auto_class)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FinefitError(f"{setup.model_label}: its own code can't be used: {reason:.300}") from error


def _brings_code(config: Mapping[str, Any], auto_class: str) -> bool:
    """Whether only code of the model's own builds it."""
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        is_remote = model_type in model_types() and family_of(model_type).get("remote_code", False)
        return bool(config.get("auto_map")) or is_remote
    is_named = auto_class in (config.get("auto_map") or ())
    return is_named and not _has_model(CONFIG_MAPPING[model_type], auto_class)


def _has_model(config_class: Any, auto_class: str) -> bool:
    return config_class in getattr(transformers, auto_class)._model_mapping


def _source(setup: TrainSetup) -> str:
    """The folder or hub id that holds the code."""
    if not isinstance(setup.model, str):
        raise ConfigError(f"{setup.model_label}: an inline config brings no code; name a folder or a hub id")
    path = Path(setup.model).expanduser()
    if path.exists():
        return str(path if path.is_dir() else path.parent)
    try:
        return resolve_model(setup.model, revision=setup.revision).hub_id or setup.model
    except FinefitError:
        return setup.model


def _register(source: str, revision: str | None, auto_class: str) -> None:
    values, _ = transformers.PretrainedConfig.get_config_dict(source, revision=revision)
    classes, model_type = values.get("auto_map") or {}, values["model_type"]
    if auto_class not in classes:
        raise LookupError(f"auto_map names no {auto_class}")
    if model_type in CONFIG_MAPPING_NAMES:
        config_class = CONFIG_MAPPING[model_type]
    else:
        config_class = get_class_from_dynamic_module(classes["AutoConfig"], source, revision=revision)
        transformers.AutoConfig.register(model_type, config_class, exist_ok=True)
    model_class = get_class_from_dynamic_module(classes[auto_class], source, revision=revision)
    getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
