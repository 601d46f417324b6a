"""How far predicted peaks were from published ones: profiles/calibration/memory-residuals*.json.

The tables are made by `finefit accuracy CASES --residuals FILE` from evidence/memory-runs.jsonl; a test keeps them equal
to what the code says. Runs of one *shape* (model, method, sharding and number of GPUs) from one source differ in
batch, kernels or preparation only; their errors are not independent of each other and count as one fact.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planner.conformal import Distribution, predict
from planner.errors import ProfileError, UsageError
from planner.index import profiles_dir
from planner.setup import TrainSetup

TABLES = {"analytic": "memory-residuals.json", "trace": "memory-residuals-trace.json"}
"""File in profiles/calibration by the estimate's source."""
DECIMALS = 4
"""Of the log ratios: published peaks have four to five digits."""


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class Kind:
    """What errors are expected to depend on."""

    stack: str
    sharding: str
    is_shared: bool
    method: str
    kernels: str


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class Runs:
    """Runs of one kind and shape from one source: natural logarithms of measured over predicted allocated peak."""

    kind: Kind
    source: str
    model: str
    num_gpus: int
    log_ratios: tuple[float, ...]

    @property
    def shape(self) -> tuple[str, str, str, int]:
        """Model, method, sharding and number of GPUs."""
        return (self.model, self.kind.method, self.kind.sharding, self.num_gpus)

    @property
    def project(self) -> str:
        """Who published it: OWNER/NAME of the repository."""
        return "/".join(self.source.split("/")[:2])


@dataclass(frozen=True, slots=True)
class Circle:
    """Kinds that count as alike; `words` name them with the question's own values."""

    words: str
    key: Callable[[Kind], Any]


CIRCLES = (
    Circle("{method}, {sharding}, {kernels} kernels", lambda k: (k.stack, k.sharding, k.method, k.kernels)),
    Circle("{method}, {sharding}", lambda k: (k.stack, k.sharding, k.method)),
    Circle("{sharding}", lambda k: (k.stack, k.sharding)),
    Circle("{share}", lambda k: (k.stack, k.is_shared)),
    Circle("{stack}", lambda k: k.stack),
    Circle("any", lambda k: True),
)
"""From narrow to wide. The first four hold within one training stack, because what finefit models is one stack."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """The narrowest circle that has published runs: its words, and how many runs of how many shapes and projects."""

    words: str
    is_narrowest: bool
    num_runs: int
    num_shapes: int
    num_projects: int


def kind_of(setup: TrainSetup) -> Kind:
    """The kind of a setup; a stack that doesn't name transformers is another trainer with its own models, and finefit's
    fused kernels are none of those that were published.
    """
    stack = (setup.stack or "transformers").lower()
    return Kind(
        stack="transformers" if "transformers" in stack else "other",
        sharding=setup.sharding,
        is_shared=setup.num_gpus > 1,
        method=setup.method,
        kernels="own" if setup.runs_own_kernels else setup.kernels,
    )


@functools.cache
def published_runs(predictor: str = "analytic") -> tuple[Runs, ...]:
    """All rows of a predictor's table; empty where it has none. Raises ProfileError for a broken file."""
    path = profiles_dir() / "calibration" / TABLES[predictor]
    if not path.is_file():
        return ()
    try:
        rows = json.loads(path.read_bytes())["runs"]
        return tuple(_runs(row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"can't read {path} ({error}): reinstall finefit") from error


def _runs(row: Mapping[str, Any]) -> Runs:
    return Runs(**{**row, "kind": Kind(**row["kind"]), "log_ratios": tuple(row["log_ratios"])})


def table_text(rows: Sequence[Runs]) -> str:
    """The table as JSON, one row to a line so that changes stay readable. Raises UsageError where there is none."""
    if not rows:
        raise UsageError("no case has a peak of rows of exact length: there is no table to write")
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in sorted(rows))
    return f'{{"schema_version": 1, "runs": [\n{lines}\n]}}\n'


def distribution(rows: Sequence[Runs], kind: Kind) -> Distribution:
    """The conformal distribution of the log ratio of a new run of this kind."""
    return predict(_clusters(ring) for ring in _rings(rows, kind))


def support(rows: Sequence[Runs], kind: Kind) -> Support | None:
    """What the distribution mostly rests on; None where nothing is known at all."""
    for number, (circle, ring) in enumerate(zip(CIRCLES, _rings(rows, kind), strict=True)):
        if ring:
            num_runs = sum(len(runs.log_ratios) for runs in ring)
            return Support(
                words=_words(circle, kind),
                is_narrowest=number == 0,
                num_runs=num_runs,
                num_shapes=len({runs.shape for runs in ring}),
                num_projects=len({runs.project for runs in ring}),
            )
    return None


def _clusters(ring: Iterable[Runs]) -> list[list[float]]:
    """The log ratios of each shape of each source."""
    clusters: dict[Any, list[float]] = {}
    for runs in ring:
        clusters.setdefault((runs.source, runs.shape), []).extend(runs.log_ratios)
    return list(clusters.values())


def _rings(rows: Sequence[Runs], kind: Kind) -> list[list[Runs]]:
    """The rows of each circle that are in no narrower one."""
    rings, left = [], list(rows)
    for circle in CIRCLES:
        wanted = circle.key(kind)
        rings.append([runs for runs in left if circle.key(runs.kind) == wanted])
        left = [runs for runs in left if circle.key(runs.kind) != wanted]
    return rings


def _words(circle: Circle, kind: Kind) -> str:
    share = "several GPUs" if kind.is_shared else "one GPU"
    sharding = kind.sharding if kind.is_shared else "one GPU"
    stack = "the transformers stack" if kind.stack == "transformers" else "other trainers"
    return circle.words.format(**asdict(kind) | {"share": share, "sharding": sharding, "stack": stack})
