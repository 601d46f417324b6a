"""Tokenised data on disk: the same file, tokenizer and settings are tokenised once."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.chat_template import ensure_template
from bench.data import Example, TokenFacts, Tokenized, extra_readers, load_rows, tokenize_rows
from planner.dataset import content_sha256
from planner.errors import FinefitError
from planner.files import user_cache, write_atomically

_LAYOUT = 5
"""Changes with what tokenising does or what the file holds, so that old files are never read as new ones."""

_ABOUT = "finefit"
"""One key of metadata: safetensors writes several in no fixed order."""


def tokenize_file(
    path: str | Path, tokenizer: Any, *, seq_len: int, objective: str = "sft", cache_dir: Path | None = None
) -> Tokenized:
    """`tokenize_rows` of a file or folder, through the cache.

    A cached file that is damaged is made again with a warning on stderr, and a cache that can't be written is done
    without, also with a warning. Raises DataError as `tokenize_rows` does.
    """
    key = _key(path, tokenizer, seq_len, objective)
    cached = (cache_dir or user_cache()) / "tokens" / f"{key}.safetensors"
    if cached.is_file():
        try:
            return _unpack(cached, key)
        except (OSError, ValueError, KeyError, TypeError, _safetensor_error()) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"warning: {cached} is damaged ({reason}); tokenising again", file=sys.stderr)
    tokenized = tokenize_rows(load_rows(path), tokenizer, seq_len=seq_len, objective=objective)
    try:
        write_atomically(cached, _pack(tokenized, key))
    except FinefitError as error:
        print(f"warning: {error}; the tokenised data is not kept", file=sys.stderr)
    return tokenized


def _key(path: str | Path, tokenizer: Any, seq_len: int, objective: str) -> str:
    ensure_template(tokenizer)
    settings = {
        "layout": _LAYOUT,
        "data": content_sha256(path, readers=extra_readers()),
        "tokenizer": tokenizer_sha256(tokenizer),
        "seq_len": seq_len,
        "objective": objective,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of all that decides which ids a text becomes: the tokenizer's state, template and special tokens."""
    parts = [tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)]
    parts += [
        tokenizer.chat_template or "",
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _pack(tokenized: Tokenized, key: str) -> bytes:
    from safetensors.numpy import save

    examples = [sequence for example in tokenized.examples for sequence in example.sequences]
    arrays = {
        "input_ids": _join([example.input_ids for example in examples]),
        "labels": _join([example.labels for example in examples]),
        "num_tokens": np.array([example.num_tokens for example in examples], dtype=np.int64),
        "rows": np.array([example.row for example in tokenized.examples], dtype=np.int64),
    }
    about = {
        "key": key,
        "sha256": _arrays_sha256(arrays),
        "facts": asdict(tokenized.facts),
        "groups": [example.group for example in tokenized.examples],
        "sequences_per_example": len(examples) // max(1, len(tokenized.examples)),
    }
    content: bytes = save(arrays, {_ABOUT: json.dumps(about)})
    return content


def _unpack(path: Path, key: str) -> Tokenized:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()[_ABOUT])
        arrays = {name: file.get_tensor(name) for name in ("input_ids", "labels", "num_tokens", "rows")}
    if about["key"] != key or about["sha256"] != _arrays_sha256(arrays):
        raise ValueError("its content is not what was written")
    borders = np.cumsum(arrays["num_tokens"])[:-1]
    ids, labels = (np.split(arrays[name], borders) for name in ("input_ids", "labels"))
    times = about["sequences_per_example"]
    groups = [group for group in about["groups"] for _ in range(times)]
    rows = np.repeat(arrays["rows"], times).tolist()
    examples = [
        Example(input_ids=i, labels=la, group=group, row=row)
        for i, la, group, row in zip(ids, labels, groups, rows, strict=True)
    ]
    if times == 2:
        pairs = zip(examples[::2], examples[1::2], strict=True)
        examples = [replace(chosen, rejected=rejected) for chosen, rejected in pairs]
    facts = about["facts"]
    return Tokenized(examples=examples, facts=TokenFacts(**{**facts, "spans": tuple(facts["spans"])}))


def _join(arrays: list[Any]) -> Any:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)


def _arrays_sha256(arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    error: type[Exception] = SafetensorError
    return error
