"""Fine-tuning methods: one file each. A method says what it trains and what PEFT must be told.

The folder is the registry: a file `NAME.py` with a constant METHOD adds the method NAME (underscores
become hyphens) everywhere: estimate, search, exports and the run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from planner.errors import UnknownNameError
from planner.setup import TrainSetup
from planner.specs import Matrix

PeftCall = tuple[str, dict[str, Any]]
"""The name of a class in `peft` and its keyword arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What a fine-tuning method trains.

    `adapter_params(matrix, setup)` is the number of elements that it adds to one copy of a matrix;
    `peft_config(setup)` is what PEFT must be told, None where the model's own weights train.
    `learning_rate` is the default peak and `learning_rate_source` where it comes from.
    """

    name: str
    summary: str
    trains_base: bool
    quantises_base: bool
    adapter_params: Callable[[Matrix, TrainSetup], int]
    peft_config: Callable[[TrainSetup], PeftCall | None]
    learning_rate: float
    learning_rate_source: str


@cache
def methods() -> dict[str, Method]:
    """All methods by name, in alphabetical order of their files."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    found = [importlib.import_module(f"planner.methods.{name}").METHOD for name in names]
    return {method.name: method for method in found}


@cache
def find_method(name: str) -> Method:
    """The method of that name; UnknownNameError with the nearest names otherwise."""
    folder = Path(__file__).parent
    module = name.replace("-", "_")
    if module.isidentifier() and (folder / f"{module}.py").is_file() and not module.startswith("_"):
        found: Method = importlib.import_module(f"planner.methods.{module}").METHOD
        return found
    raise UnknownNameError("method", name, methods())


def peak_learning_rate(setup: TrainSetup) -> float:
    """The setup's learning rate, else its method's default."""
    return setup.learning_rate if setup.learning_rate is not None else find_method(setup.method).learning_rate
