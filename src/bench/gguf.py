"""A GGUF file -> a folder of safetensors, config and tokenizer that can be trained."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench.cache import build_folder, is_whole
from planner.errors import FinefitError, MissingExtraError

_DIGIT_SPLITTERS = ("smollm",)
"""Values of `tokenizer.ggml.pre` whose vocabulary was learned with each digit split off, which transformers'
converter doesn't know: without it, " 42" after a blank gives other tokens than the model was trained on."""


def trainable_folder(gguf: Path, cache_dir: Path) -> Path:
    """The bfloat16 folder of `gguf` in the cache, converted at the first call; its name holds the file's hash.

    The weights are the dequantised ones: as exact as the quantised file, not as the model it was made from.
    Raises FinefitError when the file is no GGUF or can't be converted, MissingExtraError without package gguf.
    """
    sha256 = _check_and_hash(gguf)
    target = cache_dir / "models" / f"{gguf.stem}-{sha256[:12]}"
    if not is_whole(target):
        print(f"converting {gguf.name} to trainable weights, once …", file=sys.stderr, flush=True)
        build_folder(target, partial(_convert, gguf, sha256))
        print(f"kept in {target}", file=sys.stderr, flush=True)
    return target


def _check_and_hash(gguf: Path) -> str:
    try:
        with gguf.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise FinefitError(f"{gguf} is no GGUF file")
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FinefitError(f"can't read {gguf}: {error.strerror or error}") from error


def _convert(gguf: Path, sha256: str, folder: Path) -> Mapping[str, Any]:
    try:
        _save_tokenizer(gguf, folder)
        _save_model(gguf, folder)
    except ImportError as error:
        raise MissingExtraError("train", "train", error.name or "gguf") from error
    except (ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FinefitError(f"can't convert {gguf}: {reason}") from error
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "gguf")}
    return {"source": gguf.name, "sha256": sha256, "dtype": "bfloat16", "versions": versions}


def _save_model(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
    )
    model = model.to(torch.bfloat16)
    model.config.name_or_path = gguf.stem
    model.save_pretrained(folder)


def _save_tokenizer(gguf: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    metadata = GGUFReader(gguf)
    splitting = metadata.get_field("tokenizer.ggml.pre")
    if splitting is not None and splitting.contents() in _DIGIT_SPLITTERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(folder)
