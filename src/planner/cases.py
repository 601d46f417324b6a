"""`finefit estimate --cases FILE`: one answer per line of a JSON Lines file, in order, whatever the lines hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from planner.errors import FinefitError, UsageError
from planner.results import SCHEMA_VERSION, Estimate
from planner.setup import TrainSetup
from planner.specs import Machine


class Answered(Protocol):
    """An answer to one case."""

    def to_json(self) -> dict[str, Any]:
        """The object that a program reads."""


Answer = Callable[[TrainSetup, Machine], Estimate]
"""The closed form or the trace."""
AnyAnswer = Callable[[TrainSetup, Machine], Answered]
"""One of these, or a trace with more than its estimate."""
FindMachine = Callable[[str, dict[str, Any]], Machine]
"""`--gpu`'s words and the setup's fields -> the machine; puts the number of GPUs into the fields."""


def answer_cases(
    lines: Iterable[bytes], answer: AnyAnswer, find_machine: FindMachine, gpu: str | None = None
) -> Iterator[dict[str, Any]]:
    """An estimate's JSON, or `id` and `error`, for each line that isn't blank.

    `gpu` replaces what the cases say. A case's `stack` goes into its setup; keys beside id, gpu, setup and stack
    are ignored, an unknown key inside `setup` is an error.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _answer_line(line, number, answer, find_machine, gpu)


def _answer_line(
    line: bytes, number: int, answer: AnyAnswer, find_machine: FindMachine, gpu: str | None
) -> dict[str, Any]:
    case: Mapping[str, Any] = {}
    try:
        case = read_case(line, number)
        fields = case_fields(case)
        machine = find_machine(case_gpu(case, gpu), fields)
        estimate = answer(TrainSetup.from_dict(fields), machine)
        return {**estimate.to_json(), "id": case.get("id")}
    except FinefitError as error:
        reason = str(error)
    except Exception as error:
        # the other cases must get their answers, and this one says in its own line that finefit is at fault
        reason = f"unexpected {type(error).__name__}: {error}"
    return {"schema_version": SCHEMA_VERSION, "id": case.get("id"), "error": " ".join(reason.split())}


def read_case(line: bytes, number: int) -> Mapping[str, Any]:
    """One line as a case. Raises UsageError naming the line where it isn't a JSON object."""
    try:
        case = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except RecursionError:
        raise UsageError(f"line {number}: nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"line {number}: not JSON ({error})") from error
    if not isinstance(case, dict):
        raise UsageError(f"line {number}: a case is an object with id, gpu and setup")
    return case


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def case_fields(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case's TrainSetup fields, its `stack` among them. Raises UsageError where `setup` is missing."""
    setup = case.get("setup")
    if not isinstance(setup, dict):
        raise UsageError("setup: missing, or not an object of TrainSetup's fields")
    stack = case.get("stack")
    return {**setup, "stack": stack} if stack is not None and setup.get("stack") is None else dict(setup)


def case_gpu(case: Mapping[str, Any], gpu: str | None = None) -> str:
    """The words for a case's card; `gpu` replaces them. Raises UsageError where there are none."""
    named = gpu if gpu is not None else case.get("gpu")
    if not isinstance(named, str) or not named:
        raise UsageError("gpu: missing; name it in the case or by --gpu")
    return named
