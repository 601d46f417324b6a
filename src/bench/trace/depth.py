"""Peaks of a deep model from two shallow ones.

Live bytes at one place of the step (the loss; the first layer's backward; the last layer's forward …) are linear in
the number of layers, the maximum over places is not: so each place is extrapolated by itself and the maximum is
taken last. Shallow models end like the deep one and hold a period of each kind of layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.trace.recording import CATEGORIES, Peak, Place, Recording

if TYPE_CHECKING:
    from torch import nn

MIN_SHALLOW_LAYERS = 3
"""A first, a middle and a last layer: their peaks differ."""


@dataclass(frozen=True, slots=True)
class Depths:
    """Layers of the real model and of the two that are traced; `shallow` is None where only all layers will do.

    `irregular` counts the layers at the start that are in no period.
    """

    num_layers: int
    shallow: tuple[int, int] | None
    irregular: int = 0

    @property
    def factor(self) -> float:
        """The difference of the two traces times this leads from the shallower one to the real model."""
        if self.shallow is None:
            return 0.0
        first, second = self.shallow
        return (self.num_layers - first) / (second - first)


def choose_depths(kinds: Sequence[Hashable]) -> Depths:
    """Two depths whose layers are a start of `kinds`, differ by one period, and end like all of them.

    >>> choose_depths("a" * 32).shallow, choose_depths("d" + "ab" * 10).shallow, choose_depths("abcdefgh").shallow
    ((3, 4), (5, 7), None)
    """
    total = len(kinds)
    best = Depths(total, None)
    for start in range(total):
        for period in range(1, (total - start) // 2 + 1):
            if any(kinds[i] != kinds[i + period] for i in range(start, total - period)):
                continue
            first = _shallow_depth(total, start, period)
            if first + period < (best.shallow[1] if best.shallow else total):
                best = Depths(total, (first, first + period), start)
            break
    return best


def _shallow_depth(total: int, start: int, period: int) -> int:
    """The least depth that holds the irregular start and a period, and whose distance to `total` is in periods."""
    least = max(MIN_SHALLOW_LAYERS, start + period + (1 if start else 0))
    return least + (total - least) % period


def layer_kinds(model: nn.Module, layer_of: Mapping[str, int]) -> list[Hashable]:
    """For each layer of a model what tells its kind: the modules in it and the shapes of their parameters."""
    parts: dict[int, list[Hashable]] = {}
    for name, module in model.named_modules():
        if name in layer_of:
            shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False))
            parts.setdefault(layer_of[name], []).append((type(module).__name__, _attributes(module), shapes))
    return [tuple(parts[number]) for number in sorted(parts)]


_NUMBERING = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx", "training")


def _attributes(module: nn.Module) -> Hashable:
    """The plain settings of a module (a sliding window, a kind of attention), without its layer's number."""
    plain = (str, int, float, bool, type(None))
    return tuple((k, v) for k, v in vars(module).items() if isinstance(v, plain) and k not in _NUMBERING)


def shallow_config(config: Mapping[str, Any], num_layers: int, real_layers: int, key: str) -> dict[str, Any]:
    """The config.json of the same model with its first `num_layers` layers.

    `key` names the number of layers; lists of one entry per layer are cut too.
    """
    cut: dict[str, Any] = {}
    for name, value in config.items():
        if name == "text_config" and isinstance(value, Mapping):
            cut[name] = shallow_config(value, num_layers, real_layers, key)
        elif isinstance(value, list) and len(value) == real_layers:
            cut[name] = value[:num_layers]
        else:
            cut[name] = value
    if key in cut or "text_config" not in cut:
        cut[key] = num_layers
    return cut


@dataclass(frozen=True, slots=True)
class PhasePeak:
    """The highest peak of a phase: where, its bytes by category, and the event of the deepest traced recording."""

    place: Place
    terms: Mapping[str, int]
    at: int

    @property
    def num_bytes(self) -> int:
        """All terms together."""
        return sum(self.terms.values())


def phase_peaks(recordings: Sequence[Recording], depths: Depths, step: int) -> dict[str, PhasePeak]:
    """The highest peak of each phase of optimizer step `step`, for the real number of layers.

    `recordings` is one of all layers, or two of `depths.shallow`.
    """
    first, last = recordings[0], recordings[-1]
    low, high = (_aligned_peaks(recording, step, depths.irregular) for recording in (first, last))
    best: dict[str, tuple[float, Place]] = {}
    for place in low.keys() & high.keys():
        size = _extrapolate(low[place].num_bytes, high[place].num_bytes, depths)
        if place[0] not in best or size > best[place[0]][0]:
            best[place[0]] = (size, place)
    peaks = {}
    for phase, (_, place) in best.items():
        base, deep = first.terms_at(low[place].at), last.terms_at(high[place].at)
        terms = {c: round(_extrapolate(base[c], deep[c], depths)) for c in CATEGORIES}
        peaks[phase] = PhasePeak(place, terms, high[place].at)
    return peaks


def _extrapolate(low: int, high: int, depths: Depths) -> float:
    return low + (high - low) * depths.factor


def _aligned_peaks(recording: Recording, step: int, irregular: int) -> dict[Place, Peak]:
    """Peaks by place; a layer is named by its number from the start (0, 1, …) and from the end (-1, -2, …).

    The last layer isn't like the others, nor are the first one and the irregular ones.
    """
    found: dict[Place, Peak] = {}
    for (phase, side, layer), peak in recording.peaks(step).items():
        if side != "layer":
            found[phase, side, 0] = peak
            continue
        if layer < recording.num_layers - 1:
            found[phase, side, layer] = peak
        if layer > 0 and layer >= irregular:
            found[phase, side, layer - recording.num_layers] = peak
    return found
