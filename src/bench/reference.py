"""The reference of preference training: what the model gives each answer before the first step.

It is computed once, in one pass over the data, and kept in the cache by the content of model and data. So a step has no
second model in memory, and no second forward; the adapters of a new run give nothing yet, and a full training's
own weights are still those of its beginning.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.batching import micro_batch
from bench.data import Example
from bench.objectives import PreferenceObjective
from bench.rundata import RunData
from bench.signals import StopRequestedError
from bench.step import TrainStep, autocast
from planner.errors import FinefitError
from planner.files import user_cache, write_atomically

_LAYOUT = 1
"""Changes with what the pass computes, so that old files are never read as new ones."""
_FIELDS = ("loss", "attention", "autocast", "micro_batch_size", "eval_batch_size", "compile", "kernels")
"""Of a setup, what may change a last bit of a log probability beside model and data."""
_LIBRARIES = ("torch", "transformers", "peft")


def with_reference(step: TrainStep, data: RunData, cache_dir: Path | None = None) -> RunData:
    """The data with each pair's reference; data without pairs as it is.

    Must come before the first step, and before a checkpoint is taken over. Asks the step's `should_stop` between
    batches and raises StopRequestedError. A file that is damaged is made again with a warning on stderr; one that can't be
    written is done without, also with a warning.
    """
    examples = [*data.train, *data.held_out]
    if not isinstance(step.objective, PreferenceObjective):
        return data
    key = _key(step, data)
    cached = (cache_dir or user_cache()) / "references" / f"{key}.safetensors"
    logps = _read(cached, len(examples))
    if logps is None:
        logps = _compute(step, step.objective, examples, data.pad_id)
        _write(cached, logps)
    return _referenced(data, logps.tolist())


def without_reference(data: RunData) -> RunData:
    """As if the reference gave every answer a log probability of 0: no step's cost depends on it."""
    num_examples = len(data.train) + len(data.held_out)
    return _referenced(data, [(0.0, 0.0)] * num_examples)


def _referenced(data: RunData, logps: Sequence[Sequence[float]]) -> RunData:
    examples = [*data.train, *data.held_out]
    done = [_placed(example, *pair) for example, pair in zip(examples, logps, strict=True)]
    return replace(data, train=done[: len(data.train)], held_out=done[len(data.train) :])


def _placed(example: Example, chosen: float, rejected: float) -> Example:
    if example.rejected is None:
        return example
    return replace(
        example, reference_logp=chosen, rejected=replace(example.rejected, reference_logp=rejected)
    )


def _compute(
    step: TrainStep, objective: PreferenceObjective, examples: Sequence[Example], pad_id: int
) -> Any:
    """Log probabilities of the answers, float32 [examples, 2], chosen first."""
    setup = step.setup.with_(compile=False)
    found = np.empty((len(examples), 2), dtype=np.float32)
    was_training = step.model.training
    step.model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(step.setup, step.device):
            for numbers in _batches(step, examples):
                batch = micro_batch(setup, [[examples[number]] for number in numbers], pad_id=pad_id)
                on_device = {name: tensor.to(step.device) for name, tensor in batch.items()}
                logps = objective.logps(step.model, on_device)
                found[numbers] = logps.view(2, -1).T.cpu().numpy()
                if step.should_stop():
                    raise StopRequestedError
    finally:
        step.model.train(was_training)
    return found


def _batches(step: TrainStep, examples: Sequence[Example]) -> Iterator[list[int]]:
    """Numbers of examples, the longest first, so that little is padded."""
    size = step.setup.eval_batch_size or step.setup.micro_batch_size
    order = sorted(range(len(examples)), key=lambda number: -examples[number].width)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _key(step: TrainStep, data: RunData) -> str:
    settings = {
        "layout": _LAYOUT,
        "model": weights_sha256(step.model),
        "data": data.sha256,
        "split": [len(data.train), len(data.held_out), step.setup.seed],
        "device": step.device.type,
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
        **{name: getattr(step.setup, name) for name in _FIELDS},
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Hash of the names, shapes and bytes of all parameters and buffers, quantised ones as they are packed."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy())
    return digest.hexdigest()


def _read(path: Path, num_examples: int) -> Any:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        return None
    try:
        found = load_file(path)["logps"]
        if found.shape != (num_examples, 2) or not np.isfinite(found).all():
            raise ValueError("its content is not what was written")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"warning: {path} is damaged ({reason}); computing the reference again", file=sys.stderr)
        return None
    return found


def _write(path: Path, logps: Any) -> None:
    from safetensors.numpy import save

    try:
        write_atomically(path, save({"logps": logps}))
    except FinefitError as error:
        print(f"warning: {error}; the reference is not kept", file=sys.stderr)
