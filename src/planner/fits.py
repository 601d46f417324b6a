"""`finefit fits`: one machine, many models and methods: peak, verdict, and how far the batch can grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.checks import OBJECTIVES
from planner.errors import NotModelledError, SetupError, UsageError
from planner.estimate import Estimator, precision_recipe, usable_memory
from planner.methods import find_method
from planner.recipes import attention_for, recipe, shared_by
from planner.resolve import resolve_model
from planner.results import SCHEMA_VERSION, Estimate
from planner.setup import TrainSetup
from planner.specs import Machine, ModelSpec
from planner.stack import NEWEST_KNOWN, parse_stack
from planner.units import format_bytes

METHODS = ("full", "lora", "qlora")
"""The methods of a table where none is asked for."""
MODELS = (
    "SmolLM2-135M",
    "Qwen3-0.6B",
    "Llama-3.2-1B",
    "Qwen3-1.7B",
    "Llama-3.2-3B",
    "Qwen3-4B",
    "Mistral-7B-v0.3",
    "Llama-3.1-8B",
    "Gemma-2-9B",
    "Qwen3-14B",
    "gpt-oss-20b",
    "Qwen3-32B",
    "Llama-3.3-70B",
)
"""The models of a table where none is asked for: well-known ones of each size."""
SEQ_LEN = 2048
SEQ_LEN_STEP = 128
"""The longest sequence is searched among multiples of this."""
MAX_SEQ_LEN = 131_072
"""Where a model names no limit of its own."""
MAX_MICRO_BATCH = 512
"""The largest micro-batch that is tried: far beyond what fills a GPU."""

LICENSES: Mapping[str, Callable[[ModelSpec], bool]] = {
    "commercial": lambda model: (model.commercial or "").startswith("yes")
}
"""What `--license` may ask for; a licence that allows commercial use under conditions counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitsRow:
    """One model and method. Without an `estimate`, `problem` says why there is none.

    `longest_seq_len` is for micro-batch 1 and `largest_micro_batch_size` for the row's own length; both by the
    verdict "fits", 0 where nothing fits. A limit of the model or of the search is marked as such.
    """

    model: ModelSpec
    method: str
    estimate: Estimate | None = None
    longest_seq_len: int = 0
    is_longest_models_limit: bool = False
    largest_micro_batch_size: int = 0
    is_largest_searchs_limit: bool = False
    problem: str | None = None
    is_modelled: bool = True

    def to_json(self) -> dict[str, Any]:
        """The estimate's JSON with the row's own keys; only those where there is no estimate."""
        own = {
            "model": self.model.name,
            "hub_id": self.model.hub_id,
            "num_params": self.model.num_params,
            "method": self.method,
            "longest_seq_len": self.longest_seq_len,
            "longest_is_models_limit": self.is_longest_models_limit,
            "largest_micro_batch_size": self.largest_micro_batch_size,
            "largest_is_searchs_limit": self.is_largest_searchs_limit,
        }
        if self.estimate is None:
            return {**own, "error": self.problem, "modelled": self.is_modelled}
        return {**self.estimate.to_json(), **own}


@dataclass(frozen=True, kw_only=True, slots=True)
class FitsTable:
    """All rows for one machine, models from the smallest up, and what they all assume."""

    machine: Machine
    rows: tuple[FitsRow, ...]
    seq_len: int
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The whole table for `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "gpu": self.machine.label,
            "rows": [row.to_json() for row in self.rows],
            "assumptions": list(self.assumptions),
        }


def fits(
    machine: Machine,
    *,
    models: Mapping[str, ModelSpec] | None = None,
    methods: Sequence[str] = METHODS,
    fields: Mapping[str, Any] | None = None,
    with_times: bool = True,
) -> FitsTable:
    """Every model with every method on `machine`; `fields` are TrainSetup fields that hold for all rows.

    Without `with_times` the rows' estimates say nothing of time, which takes as long as their memory.

    `models` maps what a setup calls a model to its shapes (default: well-known ones of each size). Raises SetupError when the fields are wrong for every row, UnknownNameError for an unknown method.
    """
    fixed = dict(fields or {})
    chosen = table_models(MODELS) if models is None else models
    ordered = sorted(chosen.items(), key=lambda item: item[1].num_params)
    rows = tuple(_rows(machine, ordered, methods, fixed, with_times))
    return FitsTable(
        machine=machine,
        rows=rows,
        seq_len=fixed.get("seq_len", SEQ_LEN),
        assumptions=tuple(_assumptions(machine, rows)),
    )


def table_models(
    names: Iterable[str], stack: str | None = None, *, offline: bool = True
) -> dict[str, ModelSpec]:
    """The shapes of the models by the names given, experts as the stack keeps them. Raises as resolve_model does."""
    splits = parse_stack(stack).splits_experts
    return {name: resolve_model(name, offline=offline, experts_as_linears=splits) for name in names}


def table_setup(
    name: str, model: ModelSpec, method: str, machine: Machine, fields: Mapping[str, Any]
) -> TrainSetup:
    """The setup of one row: the method's recipe on this card, then what was asked for. A quantisation is for the
    methods that quantise, and a length for the models that know it.

    Raises SetupError for fields that contradict each other.
    """
    values: dict[str, Any] = {
        "objective": OBJECTIVES[model.architecture],
        "seq_len": SEQ_LEN,
        **recipe(method, machine.gpu),
        **attention_for(model, machine.gpu),
        **shared_by(machine.num_gpus),
        **fields,
        "method": method,
        "num_gpus": machine.num_gpus,
        "model": name,
    }
    if not find_method(method).quantises_base:
        values.pop("quant", None)
    if model.max_positions:
        values["seq_len"] = min(values["seq_len"], model.max_positions)
    return TrainSetup(**values)


def _rows(
    machine: Machine,
    models: Iterable[tuple[str, ModelSpec]],
    methods: Sequence[str],
    fields: Mapping[str, Any],
    with_times: bool,
) -> Iterator[FitsRow]:
    """Raises the first row's SetupError when no row has another outcome."""
    refusals: list[SetupError] = []
    rows = []
    for name, model in models:
        for method in methods:
            try:
                rows.append(_row(machine, name, model, method, fields, with_times))
            except NotModelledError as error:
                rows.append(FitsRow(model=model, method=method, problem=str(error), is_modelled=False))
            except SetupError as error:
                refusals.append(error)
                rows.append(FitsRow(model=model, method=method, problem=str(error)))
    if refusals and len(refusals) == len(rows):
        raise refusals[0]
    if not rows:
        raise UsageError("no model is left: the filters exclude all of them")
    return iter(rows)


def _row(
    machine: Machine, name: str, model: ModelSpec, method: str, fields: Mapping[str, Any], with_time: bool
) -> FitsRow:
    setup = table_setup(name, model, method, machine, fields)
    estimator = Estimator(setup, machine, model)
    limit = model.max_positions or MAX_SEQ_LEN

    def long(steps: int) -> tuple[int, int]:
        return 1, min(steps * SEQ_LEN_STEP, limit)

    def wide(size: int) -> tuple[int, int]:
        return size, setup.seq_len

    def most(shape: Callable[[int], tuple[int, int]], cap: int) -> int:
        return largest(lambda n: estimator.verdict(*shape(n)) == "fits", cap, _guess(estimator, shape))

    steps = most(long, -(-limit // SEQ_LEN_STEP))
    batch = most(wide, MAX_MICRO_BATCH)
    longest = min(steps * SEQ_LEN_STEP, limit)
    return FitsRow(
        model=model,
        method=method,
        estimate=estimator.at(setup.micro_batch_size, setup.seq_len, with_time=with_time),
        longest_seq_len=longest,
        is_longest_models_limit=longest == limit,
        largest_micro_batch_size=batch,
        is_largest_searchs_limit=batch == MAX_MICRO_BATCH,
    )


def largest(is_possible: Callable[[int], bool], cap: int, guess: int = 1) -> int:
    """The largest n from 1 to `cap` that is possible, 0 if none is; what is possible for n is so for less.

    `guess` is looked at first, then what lies farther and farther from it.

    >>> largest(lambda n: n * n <= 50, 100, guess=6)
    7
    """
    low, high, step = 0, cap + 1, 1
    probe = min(max(1, guess), cap)
    while high - low > 1:
        if is_possible(probe):
            low, probe = probe, probe + step if high > cap else (probe + high) // 2
        else:
            high, probe = probe, probe - step if low == 0 else (low + probe) // 2
        step *= 2
        probe = min(max(probe, low + 1), high - 1)
    return low


def _guess(estimator: Estimator, shape: Callable[[int], tuple[int, int]]) -> int:
    """Where the line through the needs of one and of eight meets what the card gives."""
    one, eight = (estimator.memory(*shape(n)).device_used_bytes for n in (1, 8))
    return 1 + 7 * (estimator.usable_bytes - one) // max(1, eight - one)


def _assumptions(machine: Machine, rows: Sequence[FitsRow]) -> Iterator[str]:
    setups = [row.estimate.setup for row in rows if row.estimate is not None]
    if setups:
        yield from describe_setups(setups)
        usable_bytes, source = usable_memory(machine)
        yield f"{machine.gpu.name}: {format_bytes(usable_bytes)} for a process ({source})"


def describe_setups(setups: Sequence[TrainSetup]) -> Iterator[str]:
    """What the setups of a table assume, each part once: recipes by method, the step, sharding, the stack."""
    yield from (
        f"{method}: {words}" for method, words in {s.method: precision_recipe(s) for s in setups}.items()
    )
    first = setups[0]
    yield f"{first.optimizer} optimizer, {first.checkpointing} checkpointing"
    yield f"{first.attention} attention, {first.loss} loss, {first.kernels} kernels"
    sharded = next((s for s in setups if s.num_gpus > 1), None)
    if sharded is not None:
        offload = "" if sharded.offload == "none" else f", {sharded.offload} offloaded"
        yield f"several GPUs: {sharded.sharding}{offload}, sizes per GPU"
    yield first.stack or NEWEST_KNOWN
