"""What a run learns, as an order: no number is made up, and only sources decide what is above what.

Compared part by part: first the share of the data's tokens that the length cuts off, then the rung (what trains, and how
exactly), then the rank, which counts up to what the data can fill. Equal parts are equal quality.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.lengths import DataLengths
from planner.methods import find_method
from planner.recipes import USUAL_RANK, precise_recipe, recipe
from planner.setup import TrainSetup
from planner.specs import GpuProfile, ModelSpec

_BIDERMAN = (
    "Biderman et al. 2024 (arXiv:2405.09673): LoRA of the usual ranks learns less than full fine-tuning"
)
_QLORA = "QLoRA paper (arXiv:2305.14314), tables 3 and 4: equal to 16 bits in its tests, though the frozen weights are rounded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A method with its precision. `level` 0 is the best; `source` says why it isn't one higher.

    `is_precise` takes the recipe with float32 weights under autocast.
    """

    name: str
    method: str
    level: int
    source: str
    is_precise: bool = False
    quant: str | None = None

    def fields(self, gpu: GpuProfile) -> dict[str, Any]:
        """The TrainSetup fields on this card."""
        chosen = precise_recipe(self.method, gpu) if self.is_precise else recipe(self.method, gpu)
        return chosen if self.quant is None else {**chosen, "quant": self.quant}


RUNGS = (
    Rung(name="full, float32 weights", method="full", level=0, is_precise=True, source=_BIDERMAN),
    Rung(
        name="full, 16-bit weights",
        method="full",
        level=1,
        source="16-bit weights round small updates away (bfloat16 has 8 significant bits); nobody ranks it against LoRA "
        "in print: it stands above for what it trains",
    ),
    Rung(name="lora, 16-bit base", method="lora", level=2, source=_BIDERMAN),
    Rung(
        name="qlora, int8 base",
        method="qlora",
        level=3,
        quant="int8",
        source="LLM.int8() (arXiv:2208.07339): outliers stay in 16 bits, the rest is rounded to 8",
    ),
    Rung(name="qlora, nf4 base", method="qlora", level=4, quant="nf4-double", source=_QLORA),
)
"""From the best."""

RANKS = (8, 16, 32, 64, 128, 256)


def rungs(wishes: Mapping[str, Any], gpu: GpuProfile) -> Iterator[Rung]:
    """The rungs that the wishes leave open on this card; a recipe of the user's own stands on its method's last rung."""
    method = wishes.get("method")
    of_method = [rung for rung in RUNGS if method in (None, rung.method)]
    if not of_method:
        yield Rung(name=str(method), method=str(method), level=len(RUNGS), source="its quality isn't ranked")
        return
    seen: list[dict[str, Any]] = []
    agreeing = [rung for rung in of_method if _agrees(rung.fields(gpu), wishes)]
    for rung in agreeing or of_method[-1:]:
        fields = rung.fields(gpu)
        # without bfloat16 both full recipes are one
        if fields not in seen:
            seen.append(fields)
            yield rung


def _agrees(fields: Mapping[str, Any], wishes: Mapping[str, Any]) -> bool:
    precision = ("quant", "weights_dtype", "autocast")
    return all(wishes[name] == fields.get(name) for name in precision if name in wishes)


def filling_rank(
    model: ModelSpec, method: str, targets: str | tuple[str, ...], lengths: DataLengths | None, epochs: float
) -> int:
    """The smallest rank whose adapters have a parameter for each token that is trained on; usual without data.

    Raises SetupError for targets that match nothing.
    """
    if lengths is None or not find_method(method).has_rank or model.is_traced:
        return USUAL_RANK
    tokens = epochs * lengths.num_rows * lengths.mean
    per_rank = adapter_params(model, method, targets) / USUAL_RANK
    return next((rank for rank in RANKS if rank >= USUAL_RANK and rank * per_rank >= tokens), RANKS[-1])


def adapter_params(model: ModelSpec, method: str, targets: str | tuple[str, ...]) -> int:
    """Trained elements at the usual rank."""
    from planner.inventory import take_inventory

    setup = TrainSetup(model=model.name, method=method, targets=targets, rank=USUAL_RANK)
    return take_inventory(setup, model).trained_params


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class Quality:
    """Less is better, part by part: share of tokens lost, level of the rung, missing rank."""

    lost_share: float
    level: int
    missing_rank: int

    @classmethod
    def of(cls, setup: TrainSetup, rung: Rung, lost_share: float | None, wanted_rank: int) -> Quality:
        """Of a setup; an unknown loss counts as the worst."""
        missing = max(0, wanted_rank - setup.rank) if find_method(setup.method).has_rank else 0
        return cls(
            lost_share=1.0 if lost_share is None else lost_share, level=rung.level, missing_rank=missing
        )
