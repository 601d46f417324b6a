"""A run that goes on from an earlier run's adapter: checked against the plan, then read into the model's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from planner.errors import FinefitError, SetupError
from planner.resolve import resolve_model
from planner.setup import TrainSetup

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_COMPARED = {
    "peft_type": "method",
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rsLoRA",
    "use_dora": "DoRA",
    "target_modules": "targets",
    "feedforward_modules": "scaled inputs",
    "num_virtual_tokens": "virtual tokens",
}
"""What must be equal for an adapter's tensors to mean the same: PEFT's name and ours."""


def start_from(setup: TrainSetup, model: Any) -> None:
    """Read the adapter of `setup.init_adapter`, a run's folder or its adapter/, into the model's own, in place.

    Raises SetupError("init_adapter") in one line: no adapter there, or all that differs from the plan.
    """
    folder = _adapter_folder(str(setup.init_adapter))
    saved = _read(folder)
    own = _own_tensors(model)
    differences = [*_config_differences(setup, folder, model), *_tensor_differences(saved, own)]
    if differences:
        raise SetupError("init_adapter", f"{folder} isn't of this plan: {'; '.join(differences)}")
    from peft import set_peft_model_state_dict

    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    set_peft_model_state_dict(model, saved)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def _adapter_folder(given: str) -> Path:
    path = Path(given).expanduser()
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    raise SetupError("init_adapter", f"{path} holds no adapter: {CONFIG} and {WEIGHTS}")


def _read(folder: Path) -> dict[str, torch.Tensor]:
    try:
        saved: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise SetupError("init_adapter", f"{folder / WEIGHTS} can't be read: {error}") from error
    return saved


def _own_tensors(model: Any) -> Mapping[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    found: Mapping[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


def _config_differences(setup: TrainSetup, folder: Path, model: Any) -> Iterator[str]:
    try:
        saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError("init_adapter", f"{folder / CONFIG} can't be read: {error}") from error
    if not isinstance(saved, dict):
        raise SetupError("init_adapter", f"{folder / CONFIG} is no adapter's config")
    own = model.peft_config["default"].to_dict()
    for name, word in _COMPARED.items():
        theirs, ours = _plain(saved.get(name)), _plain(own.get(name))
        if theirs != ours:
            yield f"{word} {_shown(theirs)} there, {_shown(ours)} here"
    base = saved.get("base_model_name_or_path")
    if isinstance(setup.model, str) and isinstance(base, str) and _identity(base) != _identity(setup.model):
        yield f"base model {base} there, {setup.model} here"


def _plain(value: Any) -> Any:
    """Sets have no order in a file, and PEFT's names are enumerations; what isn't said is off."""
    if isinstance(value, list | set | tuple):
        return tuple(sorted(map(str, value)))
    return getattr(value, "value", value) or "none"


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _identity(model: str) -> str:
    """A folder as it really lies, else the hub id that a name means."""
    path = Path(model).expanduser()
    if path.exists():
        return str(path.resolve())
    try:
        return (resolve_model(model).hub_id or model).lower()
    except FinefitError:
        return model.lower()


def _tensor_differences(saved: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """The first tensor that one of both doesn't have, or has in another shape."""
    for name in sorted({*saved, *own}):
        theirs, ours = (list(t[name].shape) if name in t else "missing" for t in (saved, own))
        if theirs != ours:
            yield f"{name} {theirs} there, {ours} here"
            return
