"""Fine-tuning methods: one file each. A method says what it trains, what that takes, and what PEFT must be told.

The folder is the registry: a file `NAME.py` with a constant METHOD adds the method NAME (underscores
become hyphens) everywhere: estimate, search, exports, trace and run.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from planner.errors import SetupError, UnknownNameError
from planner.linears import Adapt
from planner.setup import TrainSetup
from planner.specs import Matrix, ModelSpec
from planner.stack import parse_stack

PeftCall = tuple[str, dict[str, Any]]
"""The name of a class in `peft` and its keyword arguments."""
FindMatrices = Callable[[], Sequence[Matrix]]
"""Gives the matrices that are adapted to a method whose arguments depend on them; raises where the model isn't known."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor that a method adds, rows x columns (a vector has one row); frozen where it doesn't train."""

    rows: int
    columns: int
    trains: bool = True


@dataclass(frozen=True, slots=True)
class Refusal:
    """A setup that the method can't run: the field to name, when it is wrong, and what to do."""

    field: str
    is_wrong: Callable[[TrainSetup], bool]
    message: str


_LEFT = "the learned tokens stand ahead of each row"
VIRTUAL_TOKENS = (
    Refusal("dropout", lambda s: s.dropout > 0, "PEFT drops nothing there; leave it 0"),
    Refusal("targets", lambda s: s.targets != "all-linear", f"{_LEFT}, no module is named; leave it out"),
    Refusal("packing", lambda s: s.packing, f"{_LEFT}, and packed documents would share them; leave it off"),
    Refusal(
        "padding_free", lambda s: s.padding_free, f"{_LEFT}, and joined rows would share them; leave it off"
    ),
    Refusal("objective", lambda s: s.objective not in ("sft", "pretrain"), "runs with sft and pretrain only"),
    Refusal(
        "loss", lambda s: s.loss == "fused", "the fused loss doesn't know the learned tokens; use chunked"
    ),
    Refusal(
        "stack", lambda s: parse_stack(s.stack).is_older, "known for the newest stack only; leave it out"
    ),
)
"""What methods that learn tokens can't run."""
NO_DROPOUT = Refusal("dropout", lambda s: s.dropout > 0, "PEFT drops nothing there; leave it 0")


def every_linear(matrix: Matrix) -> bool:
    """What PEFT means by all-linear; planner.layers knows the rest."""
    return True


def exactly(matrices: Iterable[Matrix]) -> str:
    """A pattern of PEFT's for these matrices of each layer alone: a plain name would match longer ones that end in it.

    >>> exactly([Matrix(module="k", role="k", in_features=1, out_features=1, path="attn.k")])
    '.*\\\\.\\\\d+\\\\.(attn\\\\.k)'
    """
    paths = dict.fromkeys(re.escape(matrix.path) for matrix in matrices)
    return rf".*\.\d+\.({'|'.join(paths)})"


def no_parts(matrix: Matrix, rank: int) -> tuple[Part, ...]:
    """Nothing is added to any matrix."""
    return ()


def nothing_whole(model: ModelSpec, num_virtual_tokens: int) -> tuple[Part, ...]:
    """Nothing is added to the model as a whole."""
    return ()


def no_peft(setup: TrainSetup, find_matrices: FindMatrices) -> None:
    """PEFT has no part in it."""
    return


def rank_and_targets(setup: TrainSetup) -> str:
    """What decides the size of low-rank adapters.

    >>> rank_and_targets(TrainSetup(rank=8, targets=("q_proj", "v_proj")))
    'rank 8 on q_proj, v_proj'
    """
    targets = setup.targets if isinstance(setup.targets, str) else ", ".join(setup.targets)
    return f"rank {setup.rank} on {targets}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What a fine-tuning method trains.

    `takes(matrix)`: whether it adapts a matrix at all, and `takes_what` those in words. `parts(matrix, rank)`: what it adds to
    one module, in the order of PEFT's parameters; `adapt` records what that module then runs (planner.linears). `has_rank`: the setup's rank
    and alpha say how large that is. `whole(model, num_virtual_tokens)`: what it adds to the model itself; `lengthens`: rows grow
    by those tokens, whose gradient reaches the first layer's input; `prefixes`: each layer's keys and values do, out of a cache. `folds`: it can adapt parameters that hold all experts. `splits`: its tensors can be split
    over ranks as planner.sharding has it. `is_low_rank_sum`: an adapted module gives W x + s B A x, no more.

    `peft_config(setup, find_matrices)` is what PEFT must be told, None where the model's own weights train. PEFT's
    parameters whose names contain one of `frozen` don't train; the gradient of one of `zero_at_first` is zero in the
    first step by construction.

    `learning_rate` is the default peak, `large_learning_rate` that of models beyond planner.recipes' LARGE_MODEL_PARAMS
    where it is another one, `learning_rate_source` where both come from, `proven_rank` the largest rank that they were found with. `words(setup)` says what decides the method's size.
    """

    name: str
    summary: str
    learning_rate: float
    learning_rate_source: str
    large_learning_rate: float | None = None
    proven_rank: int | None = None
    trains_base: bool = False
    quantises_base: bool = False
    takes: Callable[[Matrix], bool] = every_linear
    takes_what: str = ""
    parts: Callable[[Matrix, int], tuple[Part, ...]] = no_parts
    adapt: Adapt | None = None
    has_rank: bool = False
    whole: Callable[[ModelSpec, int], tuple[Part, ...]] = nothing_whole
    lengthens: bool = False
    prefixes: bool = False
    folds: bool = False
    splits: bool = False
    is_low_rank_sum: bool = False
    peft_config: Callable[[TrainSetup, FindMatrices], PeftCall | None] = no_peft
    frozen: tuple[str, ...] = ()
    zero_at_first: tuple[str, ...] = ()
    words: Callable[[TrainSetup], str] = rank_and_targets
    refusals: tuple[Refusal, ...] = ()


@cache
def methods() -> dict[str, Method]:
    """All methods by name, in alphabetical order of their files."""
    found = [importlib.import_module(f"planner.methods.{name}").METHOD for name in _files()]
    return {method.name: method for method in found}


@cache
def _files() -> tuple[str, ...]:
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py")))


@cache
def find_method(name: str) -> Method:
    """The method of that name; UnknownNameError with the nearest names otherwise."""
    module = name.replace("-", "_")
    if module in _files():
        found: Method = importlib.import_module(f"planner.methods.{module}").METHOD
        return found
    raise UnknownNameError("method", name, methods())


def check_method(setup: TrainSetup) -> Method:
    """The setup's method. Raises UnknownNameError, and SetupError for a setup that it can't run."""
    method = find_method(setup.method)
    for refusal in (*method.refusals, _UNSPLIT):
        if refusal.is_wrong(setup):
            raise SetupError(refusal.field, f"{setup.method}: {refusal.message}")
    return method


def can_run(method: str, **fields: Any) -> bool:
    """Whether a method takes these fields of a setup.

    >>> can_run("prefix", checkpointing="full"), can_run("lora", checkpointing="full")
    (False, True)
    """
    try:
        check_method(TrainSetup(method=method, **fields))
    except SetupError:
        return False
    return True


_UNSPLIT = Refusal(
    "sharding",
    lambda s: s.sharding not in ("none", "ddp") and not find_method(s.method).splits,
    "its tensors aren't split over ranks here; use ddp",
)


RATE_SHARES = {"dpo": 1 / 40}
"""Of a method's default learning rate, by objective; 1 for those that aren't here."""
RATE_SHARE_SOURCES = {
    "dpo": "1/40 of it for DPO, as in Zephyr's recipes (alignment-handbook): 2e-5 to 5e-7 full, 2e-4 to 5e-6 QLoRA"
}


def peak_learning_rate(setup: TrainSetup) -> float:
    """The setup's learning rate, else its method's default, or the share of it that its objective takes."""
    if setup.learning_rate is not None:
        return setup.learning_rate
    return find_method(setup.method).learning_rate * RATE_SHARES.get(setup.objective, 1)


def learning_rate_source(setup: TrainSetup) -> str:
    """Where the default learning rate comes from."""
    sources = (find_method(setup.method).learning_rate_source, RATE_SHARE_SOURCES.get(setup.objective))
    return "; ".join(source for source in sources if source)
