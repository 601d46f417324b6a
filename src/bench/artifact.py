"""What a run leaves for use: `adapter/` in PEFT's format, or `model/`; written aside, renamed, read back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from bench.build import inner_model, torch_dtype
from bench.checkpoint import sync
from planner.errors import FinefitError
from planner.setup import TrainSetup

_RELOADED = "reloaded"


def write_artifact(
    setup: TrainSetup,
    model: Any,
    tokenizer: Any,
    run_folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Save adapter or model with its tokenizer; the folder's path. Raises FinefitError with nothing half-written.

    `weights` are those that trained, where the model's own are split over ranks.
    """
    target = run_folder / ("adapter" if setup.uses_adapters else "model")
    aside = run_folder / f".writing-{target.name}"
    config = inner_model(model).config
    try:
        shutil.rmtree(aside, ignore_errors=True)
        config.use_cache = True
        if setup.uses_adapters:
            _name_base(setup, model)
            # PEFT would otherwise ask the hub whether the embeddings were resized
            model.save_pretrained(aside, state_dict=weights, save_embedding_layers=False)
        else:
            model.save_pretrained(aside, state_dict=weights and {**_buffers(model), **weights})
        tokenizer.save_pretrained(aside)
        sync(*aside.iterdir(), aside)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        sync(run_folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise FinefitError(f"can't write {target}: {error}") from error
    finally:
        config.use_cache = False
    return target


def _name_base(setup: TrainSetup, model: Any) -> None:
    """The adapter names its base as the plan does, not by the cache folder that it was read from."""
    if isinstance(setup.model, str):
        for config in model.peft_config.values():
            config.base_model_name_or_path = setup.model


def verify_artifact(setup: TrainSetup, model: Any, target: Path, token_ids: torch.Tensor) -> None:
    """Read the artifact back and raise FinefitError unless it is what is in memory.

    An adapter must give the same logits on `token_ids` [1, T] as the trained model, and others than the base.
    """
    if not setup.uses_adapters:
        _compare_weights(model, target)
        return
    was_training = model.training
    model.eval()
    try:
        trained = _logits(model, token_ids)
        with model.disable_adapter():
            base = _logits(model, token_ids)
        reloaded = _reloaded_logits(setup, model, target, token_ids)
    finally:
        model.train(was_training)
    if not torch.equal(trained, reloaded):
        worst = float((trained - reloaded).abs().max())
        raise FinefitError(
            f"{target}: read back, it gives other logits than the trained model (by {worst:.3g})"
        )
    if torch.equal(trained, base):
        raise FinefitError(f"{target}: the adapter changes no logit: the run has trained nothing")


def verify_weights(setup: TrainSetup, model: Any, target: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Read the artifact back and raise FinefitError unless it holds the `weights` that trained, and these have changed."""
    expected = dict(weights)
    if setup.uses_adapters:
        from peft import get_peft_model_state_dict

        expected = get_peft_model_state_dict(model, state_dict=expected)
        zero_at_first = [tensor for name, tensor in expected.items() if "lora_B" in name]
        if zero_at_first and not any(bool(tensor.any()) for tensor in zero_at_first):
            raise FinefitError(f"{target}: the adapter changes no logit: the run has trained nothing")
    saved: dict[str, torch.Tensor] = {}
    for file in target.glob("*.safetensors"):
        saved |= load_file(file)
    wrong = [name for name, t in expected.items() if name not in saved or not torch.equal(saved[name], t)]
    if wrong:
        raise FinefitError(f"{target}: {wrong[0]}, read back, differs from the trained weight")


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a saved model holds beside its parameters."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _logits(model: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits: torch.Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits.float()


def _reloaded_logits(setup: TrainSetup, model: Any, target: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """The logits of the saved adapter, loaded beside the trained one."""
    model.load_adapter(str(target), adapter_name=_RELOADED, torch_device=str(token_ids.device))
    try:
        for name, parameter in model.named_parameters():
            if f".{_RELOADED}." in name:
                parameter.data = parameter.data.to(torch_dtype(setup.adapter_dtype))
        model.set_adapter(_RELOADED)
        return _logits(model, token_ids)
    finally:
        model.set_adapter("default")
        model.delete_adapter(_RELOADED)


def _compare_weights(model: nn.Module, target: Path) -> None:
    """Every saved tensor equals the one in memory; tied weights are saved once."""
    in_memory = model.state_dict()
    for file in sorted(target.glob("*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for name in saved.keys():  # noqa: SIM118 - safe_open is no mapping
                if not torch.equal(saved.get_tensor(name), in_memory[name].cpu()):
                    raise FinefitError(f"{target}: {name}, read back, differs from the trained weight")
