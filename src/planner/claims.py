"""What the guides say that finefit grew out of, and whether it holds: profiles/claims/*.toml against finefit's numbers.

A claim is a quote, the configurations that it must mean, and the rule that decides (planner.claim_rules). Nothing of
a verdict is written down: it follows from the estimates and the dated prices.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from planner.cost import Span
from planner.errors import ProfileError
from planner.index import raw_profiles
from planner.money import Money
from planner.results import SCHEMA_VERSION, Estimate

TRUE, TRUE_ONLY_IF, FALSE = "true", "true-only-if", "false"
NOT_HARDWARE, NOT_ANSWERED = "not-a-hardware-claim", "not-answered"
VERDICTS = (TRUE, TRUE_ONLY_IF, FALSE, NOT_HARDWARE, NOT_ANSWERED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """One of the source documents."""

    id: str
    title: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One configuration that a claim must mean: TrainSetup fields on `gpu`; `num_tokens` of a whole run, if it is one."""

    gpu: str
    fields: Mapping[str, Any]
    num_tokens: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A quote and how it is judged; `limits` are the rule's own numbers. Notes say what the numbers can't."""

    id: str
    guide: str
    quote: str
    rule: str
    cases: tuple[Case, ...]
    limits: Mapping[str, Any]
    note: str
    note_zh: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What finefit says of one case. `holds` None: between yes and no (tight), or unknown where nothing else is given.

    `estimate` None: refused, and `error` says why. `share`: of parameters that train, or of memory that is saved;
    `ratio`: of speeds; `hours` of the whole run; `money`: of the run, the month or the card, with its source.
    """

    case: Case
    holds: bool | None
    estimate: Estimate | None = None
    error: str | None = None
    share: float | None = None
    ratio: float | None = None
    hours: Span | None = None
    money: Money | None = None
    money_source: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Without the whole estimate: its setup, card and decisive figures."""
        found = self.estimate
        return {
            "holds": self.holds,
            "gpu": self.case.gpu,
            "setup": dict(self.case.fields) if found is None else found.setup.to_dict(),
            "verdict": None if found is None else found.fit.verdict,
            "peak_allocated_bytes": None if found is None else found.memory.peak_allocated_bytes,
            "device_used_bytes": None if found is None else found.memory.device_used_bytes,
            "usable_bytes": None if found is None else found.fit.usable_bytes,
            "error": self.error,
            "share": self.share,
            "ratio": self.ratio,
            "hours": None if self.hours is None else [self.hours.low, self.hours.high],
            "money": None if self.money is None else self.money.to_json(),
            "money_source": self.money_source,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """A configuration near a refused one that fits: its estimate, and which fields changed to what."""

    estimate: Estimate
    changes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A claim, its verdict, and what the verdict follows from."""

    claim: Claim
    verdict: str
    findings: tuple[Finding, ...] = ()
    nearest: Nearest | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that `finefit claims --json` lists."""
        near = self.nearest
        return {
            "id": self.claim.id,
            "guide": self.claim.guide,
            "quote": self.claim.quote,
            "rule": self.claim.rule,
            "limits": dict(self.claim.limits),
            "verdict": self.verdict,
            "findings": [finding.to_json() for finding in self.findings],
            "nearest": None
            if near is None
            else {"gpu": near.estimate.gpu, "setup": near.estimate.setup.to_dict(), "changes": near.changes},
            "note": self.claim.note,
            "note_zh": self.claim.note_zh,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """All claims; `prices_as_of` is the day that prices are judged from: the newest of the snapshot's."""

    guides: tuple[Guide, ...]
    judged: tuple[Judged, ...]
    prices_as_of: datetime.date
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> dict[str, Any]:
        """The object of `finefit claims --json`."""
        return {
            "schema_version": self.schema_version,
            "prices_as_of": self.prices_as_of.isoformat(),
            "guides": [asdict(guide) for guide in self.guides],
            "claims": [judged.to_json() for judged in self.judged],
        }


def read_guides() -> tuple[Guide, ...]:
    """The source documents, in order."""
    return tuple(Guide(id=name, **entry) for name, entry in _raw()["guides"].items())


def read_claims() -> tuple[Claim, ...]:
    """All claims, in order. Raises ProfileError for one that lacks something."""
    return tuple(_claim(entry) for entry in _raw()["claim"])


def _raw() -> Mapping[str, Any]:
    return raw_profiles("claims")["claims"]


_KEYS = {"id", "guide", "quote", "rule", "cases", "note", "note_zh", "setup"}


def _claim(entry: Mapping[str, Any]) -> Claim:
    try:
        shared = entry.get("setup", {})
        return Claim(
            id=entry["id"],
            guide=entry["guide"],
            quote=entry["quote"],
            rule=entry["rule"],
            cases=tuple(_case(case, shared) for case in entry.get("cases", ())),
            limits={name: value for name, value in entry.items() if name not in _KEYS},
            note=entry.get("note", ""),
            note_zh=entry.get("note_zh", ""),
        )
    except KeyError as error:
        raise ProfileError(f"profiles/claims: claim {entry.get('id')}: no {error}") from error


def _case(entry: Mapping[str, Any], shared: Mapping[str, Any]) -> Case:
    fields = {name: value for name, value in entry.items() if name not in ("gpu", "num_tokens")}
    return Case(gpu=entry["gpu"], fields={**shared, **fields}, num_tokens=entry.get("num_tokens"))
