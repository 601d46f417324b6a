"""A machine's own corrections of its rates, term by term, learnt from results that were measured on it.

`finefit calibrate` writes them to the user's data folder. They hold for the rates that they were learnt on: once the
machine is measured anew they are left alone until it is calibrated anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from planner.errors import DataError
from planner.rates import Curve, Found, Rates, machine_file
from planner.specs import Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """One term: its time is multiplied by `factor`.

    `num_results` results spend a good share of their step on it. `spread`: the standard error of the factor's logarithm.
    """

    factor: float
    num_results: int
    spread: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What results taught about one device.

    `corrections` by the names of TERMS; a term that the results say too little of is not in it. `origin`: of which
    rates (`origin_of`). `log_errors`: logarithms of measured over predicted step time of each setup, each predicted
    from the others. `error_before` and `error_after`: mean absolute relative error of these setups without and with
    corrections learnt from the others.
    """

    machine: str
    measured_at: str
    origin: str
    num_results: int
    corrections: Mapping[str, Correction]
    log_errors: tuple[float, ...]
    error_before: float
    error_after: float
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return {"schema_version": 1, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        """Raises KeyError, TypeError or ValueError for anything that isn't a calibration."""
        plain = {key: value for key, value in values.items() if key != "schema_version"}
        corrections = {str(name): Correction(**row) for name, row in plain["corrections"].items()}
        if unknown := corrections.keys() - TERMS.keys():
            raise ValueError(f"unknown terms: {', '.join(sorted(unknown))}")
        errors = tuple(float(error) for error in plain["log_errors"])
        return cls(**{**plain, "corrections": corrections, "log_errors": errors})

    def apply(self, rates: Rates) -> Rates:
        """The rates with every known term corrected."""
        return corrected(rates, {name: one.factor for name, one in self.corrections.items()})

    @property
    def words(self) -> str:
        """What it rests on, for people."""
        return (
            f"corrected by {self.num_results} results of this machine (held-out error {self.error_after:.0%})"
        )


def corrected(rates: Rates, factors: Mapping[str, float]) -> Rates:
    """The rates with the time of each named term multiplied by its factor."""
    for name, factor in factors.items():
        rates = TERMS[name](rates, factor)
    return rates


def _curve(field: str, width: int) -> Callable[[Rates, float], Rates]:
    def change(rates: Rates, factor: float) -> Rates:
        curves = getattr(rates, field)
        if width not in curves:
            return rates
        own = Curve(tuple((size, rate / factor) for size, rate in curves[width].points))
        changed: dict[str, Any] = {field: {**curves, width: own}}
        return replace(rates, **changed)

    return change


def _rate(*names: str) -> Callable[[Rates, float], Rates]:
    def change(rates: Rates, factor: float) -> Rates:
        known = {name: getattr(rates, name) for name in names}
        return replace(rates, **{name: rate / factor for name, rate in known.items() if rate is not None})

    return change


def _time(*names: str) -> Callable[[Rates, float], Rates]:
    def change(rates: Rates, factor: float) -> Rates:
        return replace(rates, **{name: getattr(rates, name) * factor for name in names})

    return change


TERMS: Mapping[str, Callable[[Rates, float], Rates]] = {
    "products, 16 bits": _curve("matmul", 2),
    "products, 32 bits": _curve("matmul", 4),
    "weight gradients, 16 bits": _curve("weight_matmul", 2),
    "weight gradients, 32 bits": _curve("weight_matmul", 4),
    "attention, 16 bits": _curve("attention", 2),
    "attention, 32 bits": _curve("attention", 4),
    "pointwise operations": _rate("memory_bytes_per_s"),
    "optimizer": _rate("optimizer_bytes_per_s"),
    "clipping": _rate("clip_bytes_per_s"),
    "4-bit weights": _rate("dequantise_bytes_per_s"),
    "launches": _time("launch_s", "kernel_s", "step_s"),
    "links": _rate("link_bytes_per_s", "network_bytes_per_s"),
}
"""What a step's time is made of, each with the rates behind it."""


def origin_of(found: Found) -> str:
    """Tells apart the rates that corrections can be learnt on: a digest of the measured rates, or of their class'."""
    plain = found.rates.to_json() if found.reached is None else asdict(found.reached)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def calibration_file(machine: Machine) -> Path:
    """Where a device's corrections are kept: beside its measured rates."""
    rates = machine_file(machine.gpu)
    return rates.with_name(rates.name.replace("machine-rates", "calibration", 1))


def calibration_of(machine: Machine, found: Found | None) -> Calibration | None:
    """This machine's corrections of the rates found for it; None for other machines, and for other rates than theirs."""
    if not machine.is_local or found is None:
        return None
    known = read_calibration(calibration_file(machine))
    return known if known is not None and known.origin == origin_of(found) else None


@functools.cache
def read_calibration(path: Path) -> Calibration | None:
    """A kept calibration; None where there is none. Raises DataError for a broken file."""
    if not path.is_file():
        return None
    try:
        return Calibration.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(str(path), f"not a calibration ({error}); delete it") from error
