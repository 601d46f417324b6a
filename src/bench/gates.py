"""Bounds on a comparison, for CI: `step_s<=1.05` fails when B's step takes more than 1.05 times A's."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.compare import GATED, Comparison
from planner.errors import GateError, UsageError, nearest_names

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_GATE = re.compile(r"\s*([a-z_0-9]+)\s*(<=|>=|<|>)\s*([0-9]*\.?[0-9]+)\s*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A bound on the ratio B / A of one quantity."""

    quantity: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.quantity}{self.sign}{self.bound:g}"

    def holds(self, ratio: float) -> bool:
        """Whether the ratio is within the bound."""
        return _OPERATORS[self.sign](ratio, self.bound)


def read_gate(text: str) -> Gate:
    """The bound that a text means. Raises UsageError for what isn't one.

    >>> str(read_gate("step_s <= 1.05"))
    'step_s<=1.05'
    """
    match = _GATE.fullmatch(text)
    if match is None:
        raise UsageError(f"--gate {text!r}: give QUANTITY<=RATIO, as in step_s<=1.05")
    quantity, sign, bound = match.groups()
    if quantity not in GATED:
        nearest = ", ".join(nearest_names(quantity, GATED)) or ", ".join(GATED)
        raise UsageError(f"--gate {quantity}: no such quantity; nearest: {nearest}")
    return Gate(quantity=quantity, sign=sign, bound=float(bound))


def check_gates(
    gates: Sequence[Gate], found: Sequence[Comparison], *, any_machine: bool = False
) -> list[str]:
    """One line per gate and comparison. Raises GateError (exit 3) with all that don't hold or can't be judged."""
    lines, broken = [], []
    for comparison in found:
        if gates and comparison.is_same_machine is False and not any_machine:
            raise GateError(
                "the runs are from different machines: no gate is judged (--any-machine judges anyway)"
            )
        for gate in gates:
            ratio = comparison.ratios.get(gate.quantity)
            shown = "not measured on both sides" if ratio is None else f"{ratio:.3f}"
            line = f"{gate}: {shown}{f' ({comparison.label})' if comparison.label else ''}"
            lines.append(line)
            if ratio is None or not gate.holds(ratio):
                broken.append(line)
    if broken:
        raise GateError(f"gate failed: {'; '.join(broken)}")
    return lines
