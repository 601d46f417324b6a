"""Memory of an architecture that has no formulas, from traces of it that were made once.

`finefit estimate CONFIG --trace` traces a few batches and lengths and writes what it found to the user's cache
(bench.trace.coefficients); this module reads it, without torch. At one moment of the step the live bytes are a
polynomial: linear in the rows of a micro-batch and quadratic in their length. So each moment that can be a phase's
highest is kept as its bytes at six traced points, by category, and what lies between is interpolated exactly.
Where the program itself changes with the length (a mask beyond a sliding window), there are several regions, each
traced by itself. Beyond what was traced and checked there is an error, never an extrapolation.

Raises in general: NotModelledError where nothing (or nothing for this setup) was traced, and naming the file where it
is broken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from planner.errors import NotModelledError
from planner.files import user_cache
from planner.setup import TrainSetup
from planner.specs import ModelSpec

FORMAT = 2
NUM_LENGTHS, NUM_SIZES = 3, 2
CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "temporary")
"""What bench.trace.recording tells apart."""

_NEVER_DECISIVE = (
    *(
        "model",
        "revision",
        "tokenizer",
        "from_scratch",
        "data",
        "eval_fraction",
        "micro_batch_size",
        "seq_len",
    ),
    *("alpha", "learning_rate", "schedule", "warmup_steps", "epochs", "max_steps", "seed"),
)
"""Fields of a setup that no tensor's size depends on, and the two that the coefficients answer for."""
_VOLATILE_KEYS = ("_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype")
"""Keys of a config.json that don't change the model that trains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A range of rows and lengths (both ends included) in which the step runs one and the same program.

    `sizes` and `lengths` are the traced points; `phases` gives for each phase the candidates for its highest moment:
    bytes by category at (sizes[0], lengths[0]), (sizes[0], lengths[1]) … (sizes[1], lengths[2]).
    """

    sizes: tuple[int, int]
    lengths: tuple[int, int, int]
    phases: Mapping[str, tuple[Mapping[str, tuple[float, ...]], ...]]

    def holds(self, micro_batch_size: int, seq_len: int) -> bool:
        """Whether a batch shape lies inside."""
        is_inside = self.lengths[0] <= seq_len <= self.lengths[-1]
        return is_inside and self.sizes[0] <= micro_batch_size <= self.sizes[-1]

    def at(self, micro_batch_size: int, seq_len: int) -> dict[str, dict[str, float]]:
        """Bytes by phase and category."""
        rows, columns = _weights(self.sizes, micro_batch_size), _weights(self.lengths, seq_len)
        weights = [r * c for r in rows for c in columns]
        return {name: _highest(candidates, weights) for name, candidates in self.phases.items()}


def _weights(nodes: tuple[int, ...], at: int) -> list[float]:
    """Lagrange's weights of the nodes; equal nodes count once."""
    found = []
    for i, node in enumerate(nodes):
        weight = 0.0 if node in nodes[:i] else 1.0
        for other in set(nodes) - {node}:
            weight *= (at - other) / (node - other)
        found.append(weight)
    return found


def _highest(
    candidates: tuple[Mapping[str, tuple[float, ...]], ...], weights: list[float]
) -> dict[str, float]:
    evaluated = [
        {name: sum(w * v for w, v in zip(weights, values, strict=True)) for name, values in terms.items()}
        for terms in candidates
    ]
    return max(evaluated, key=lambda terms: sum(terms.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """What traces of one config with one setup found; sizes in bytes.

    `host_states_bytes` are paged optimizer states; `trained_bytes` the parameters that train. `versions` are those of
    the libraries that were traced, `checked` says in words which other points were traced and how far off they were.
    """

    model: ModelSpec
    regions: tuple[Region, ...]
    trained_bytes: int
    host_states_bytes: int
    versions: Mapping[str, str]
    checked: str

    def at(self, micro_batch_size: int, seq_len: int) -> dict[str, dict[str, float]]:
        """Bytes by phase and category. Raises NotModelledError outside what was traced."""
        for region in self.regions:
            if region.holds(micro_batch_size, seq_len):
                return region.at(micro_batch_size, seq_len)
        raise NotModelledError(
            f"{self.model.name}: {micro_batch_size} x {seq_len} tokens is outside what was traced "
            f"({self.range_text()}); trace this point with --trace"
        )

    def range_text(self) -> str:
        """What was traced, in words."""
        most = max(region.sizes[-1] for region in self.regions)
        shortest = min(region.lengths[0] for region in self.regions)
        longest = max(region.lengths[-1] for region in self.regions)
        return f"micro-batches of 1 to {most} rows of {shortest} to {longest} tokens"

    def describe(self) -> str:
        """Where the figures come from, for an estimate's assumptions."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"coefficients from a trace of this config ({versions}), {self.range_text()}; {self.checked}; "
            "time unknown"
        )


def decisive_fields(setup: TrainSetup, *, on_gpu: bool) -> dict[str, Any]:
    """What of a setup the coefficients depend on, as JSON values; more than two micro-batches are as two."""
    plain = {f.name: getattr(setup, f.name) for f in fields(setup) if f.name not in _NEVER_DECISIVE}
    targets = list(setup.targets) if isinstance(setup.targets, tuple) else setup.targets
    steps = min(setup.grad_accum_steps, 2)
    return {**plain, "targets": targets, "grad_accum_steps": steps, "on_gpu": on_gpu}


def folder_of(config: Mapping[str, Any]) -> Path:
    """Where the coefficients of a config are, whatever the setup; needn't exist."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    return user_cache() / "coefficients" / _digest(kept)


def file_of(config: Mapping[str, Any], setup: TrainSetup, *, on_gpu: bool) -> Path:
    """The file for one config and setup; needn't exist."""
    return folder_of(config) / f"{_digest(decisive_fields(setup, on_gpu=on_gpu))}.json"


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def traced_model(config: Mapping[str, Any], name: str | None = None) -> ModelSpec | None:
    """The model of a config that was traced with any setup: its size and limits, without layers; else None."""
    files = sorted(folder_of(config).glob("*.json"))
    if not files:
        return None
    model = _read(files[0]).model
    return replace(model, name=name or model.name, config=config)


def load(model: ModelSpec, setup: TrainSetup, *, on_gpu: bool) -> Coefficients:
    """The coefficients of a traced model for `setup`.

    Raises NotModelledError, with what the nearest traced setup has otherwise, where there are none for it.
    """
    path = file_of(model.config, setup, on_gpu=on_gpu)
    if path.is_file():
        found = _read(path)
        _check_versions(found, path)
        return found
    wanted = decisive_fields(setup, on_gpu=on_gpu)
    raise NotModelledError(
        f"{model.name}: not traced with this setup{_nearest(path.parent, wanted)}; "
        "`finefit estimate … --trace` with the same options does that once"
    )


def _nearest(folder: Path, wanted: Mapping[str, Any]) -> str:
    """How the setup differs from the traced one that is most like it."""
    differences = []
    for traced in _traced_setups(folder):
        differences.append([f"{k} {traced.get(k)}" for k in wanted if traced.get(k) != wanted[k]])
    best = min(differences, key=len, default=[])
    return f" (traced was {', '.join(best)})" if best else ""


def _traced_setups(folder: Path) -> Iterator[Mapping[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield _read_json(path)["setup"]


def _check_versions(found: Coefficients, path: Path) -> None:
    """Where the traced libraries are installed here in other versions, the trace is of another program."""
    for name, traced in found.versions.items():
        here = _installed(name)
        if here is not None and here != traced:
            raise NotModelledError(
                f"{found.model.name}: traced with {name} {traced}, installed is {here}; "
                f"`finefit estimate … --trace` traces it again (or delete {path})"
            )


def _installed(library: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> Coefficients:
    raw = _read_json(path)
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _broken(path, f"{type(error).__name__}: {error}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, str(error)) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("setup"), dict):
        raise _broken(path, f"not of format {FORMAT}")
    return raw


def _broken(path: Path, reason: str) -> NotModelledError:
    detail = " ".join(reason.split())
    return NotModelledError(f"{path}: broken coefficients ({detail:.100}); delete the file, or trace again")


def _parse(raw: Mapping[str, Any]) -> Coefficients:
    facts = raw["model"]
    model = ModelSpec(
        name=str(facts["name"]),
        hub_id=None,
        family=str(facts["model_type"]),
        architecture=str(facts["architecture"]),
        hidden_size=int(facts["hidden_size"]),
        vocab_size=int(facts["vocab_size"]),
        max_positions=int(facts["max_positions"]),
        layers=(),
        embedding_params=int(facts["num_params"]),
        token_embedding_params=0,
        head=None,
        tied_head=False,
        final_params=0,
    )
    return Coefficients(
        model=model,
        regions=tuple(_parse_region(region) for region in raw["regions"]),
        trained_bytes=int(raw["trained_bytes"]),
        host_states_bytes=int(raw["host_states_bytes"]),
        versions={str(name): str(version) for name, version in raw["versions"].items()},
        checked=str(raw["checked"]),
    )


def _parse_region(raw: Mapping[str, Any]) -> Region:
    first, last = (int(n) for n in raw["sizes"])
    shortest, middle, longest = (int(n) for n in raw["lengths"])
    phases = {name: tuple(_parse_terms(c) for c in candidates) for name, candidates in raw["phases"].items()}
    if not all(phases.values()):
        raise ValueError("a phase without candidates")
    return Region(sizes=(first, last), lengths=(shortest, middle, longest), phases=phases)


def _parse_terms(raw: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    terms = {name: tuple(float(v) for v in raw[name]) for name in CATEGORIES}
    if any(len(values) != NUM_LENGTHS * NUM_SIZES for values in terms.values()):
        raise ValueError("not six points")
    return terms
