"""Coefficients of an architecture that has no formulas: a few traces, from which every batch and length follows.

The step's program is a list of allocations and frees. Where two batch shapes run the same program, the live bytes
after each event are a polynomial in rows and length (planner.coefficients says which), so six traces give all of them
at once, and only the moments that can be a phase's highest are kept. Where the programs differ (a mask from some
length on, a copy that one row doesn't need), the range is divided there and each part is traced by itself. Points
that took no part are traced to check; one that is off by more than MOST_OFF refuses everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bench.build import AUTO_CLASSES, build_model, load_config, one_line
from bench.remote_code import refuse_code
from bench.trace.recording import Recording
from bench.trace.resume import PHASE as RESUME
from bench.trace.run import NUM_STEPS, Progress, TraceResult, trace
from planner import __version__
from planner.coefficients import CATEGORIES, FORMAT, Region, decisive_fields, file_of
from planner.errors import FinefitError, NotModelledError
from planner.files import write_atomically
from planner.optimizers import find_optimizer
from planner.resolve import read_config
from planner.setup import TrainSetup

MOST_OFF = 0.005
"""The largest error of any phase at a point that took no part, relative to what was traced there."""
SHORTEST, SHORTEST_CHUNKED = 128, 512
"""Rows from which on coefficients answer; a chunked loss has whole chunks from 512 tokens on."""
LONGEST, LONGEST_UNNAMED = 131_072, 32_768
"""Up to the model's own limit, or where it names none."""
MOST_ROWS = 512
MOST_REGIONS = 8
USUAL_TRACES = 12
"""Of two regions: a single row, and more."""
LIBRARIES = ("transformers", "torch", "peft", "bitsandbytes")
PHASES = ("load", "forward", "loss", "backward", "optimizer", "save", "eval")
_CHUNKED_PHASES = ("loss", "eval")
"""A chunked loss runs its loop as often as there are chunks: a longer program, but the same moments."""

Shape = tuple[int, int]
"""Rows of a micro-batch, and their length in tokens."""


def learn(setup: TrainSetup, *, on_gpu: bool, progress: Progress | None = None) -> Path:
    """Trace the setup's model at a few batch shapes and write its coefficients to the cache; returns the file.

    Raises ConfigError or FinefitError where transformers can't build or run it, or where it needs code of its own;
    NotModelledError where no coefficients describe it. Then nothing is written.
    """
    config = read_config(setup.model, revision=setup.revision)
    refuse_code(config, AUTO_CLASSES[setup.objective], setup.model_label)
    inline = setup.with_(model=dict(config))
    traces = _Traces(inline, on_gpu=on_gpu, progress=progress)
    shapes = _range(inline, config)
    regions = list(_divide(traces, *shapes))
    worst, points = _check(traces, regions)
    content = {
        "format": FORMAT,
        "setup": decisive_fields(setup, on_gpu=on_gpu),
        **_facts(inline, longest=shapes[1][1]),
        "versions": _versions(),
        "finefit": __version__,
        "checked": f"checked at {', '.join(f'{b} x {n}' for b, n in points)}: off by at most {worst:.2%}",
        "regions": [_to_json(region) for region in regions],
    }
    path = file_of(config, setup, on_gpu=on_gpu)
    write_atomically(path, json.dumps(content) + "\n")
    return path


def _range(setup: TrainSetup, config: Mapping[str, Any]) -> tuple[Shape, Shape]:
    """The smallest and the largest batch shape; the setup's own lies between them."""
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings") or text.get("n_positions") or LONGEST_UNNAMED
    longest = max(min(int(limit), LONGEST), setup.seq_len)
    shortest = SHORTEST if setup.loss == "full" else SHORTEST_CHUNKED
    return (1, min(shortest, longest, setup.seq_len)), (max(MOST_ROWS, setup.micro_batch_size), longest)


@dataclass(frozen=True, slots=True)
class _Trace:
    """One traced batch shape: its program, and by phase the bytes by category [moments, categories]."""

    program: int
    moments: Mapping[str, Any]


class _Traces:
    """Traces of one setup at any batch shape, each made once."""

    def __init__(self, setup: TrainSetup, *, on_gpu: bool, progress: Progress | None) -> None:
        self._setup, self._on_gpu, self._progress = setup, on_gpu, progress
        self._num_made = 0
        self.at = cache(self._trace)
        self.suspects = sorted(_numbers(setup.model))

    def _trace(self, shape: Shape) -> _Trace:
        if self._progress is not None:
            text = f"unknown architecture, learning it: {shape[0]} x {shape[1]} tokens"
            self._progress(text, self._num_made, max(USUAL_TRACES, self._num_made + 1))
        self._num_made += 1
        setup = self._setup.with_(micro_batch_size=shape[0], seq_len=shape[1])
        try:
            traced = trace(setup, on_gpu=self._on_gpu)
        except FinefitError:
            raise
        except Exception as error:
            # Whatever the model's own code raises on fake tensors: the library's bug or a limit of tracing.
            raise FinefitError(
                f"{setup.model_label}: can't trace its step: {one_line(error):.300}"
            ) from error
        moments = {**_moments(traced.timeline), **_apart(traced)}
        return _Trace(self._program(traced.timeline, moments), moments)

    def _program(self, timeline: Recording, moments: Mapping[str, Any]) -> int:
        """A number for the sequence of allocations, without loops over chunks."""
        loops = _CHUNKED_PHASES if self._setup.loss != "full" else ()
        ops = [(s.phase, s.op, s.layer) for s in timeline.storages if s.phase not in loops]
        return hash((tuple(ops), tuple((p, len(m)) for p, m in moments.items() if p not in loops)))


def _numbers(config: Any) -> set[int]:
    """Whole numbers in a config: lengths at which a program may change are among them."""
    values = config.values() if isinstance(config, Mapping) else [config]
    found = {v for v in values if isinstance(v, int) and not isinstance(v, bool)}
    return found.union(*(_numbers(v) for v in values if isinstance(v, Mapping)))


def _moments(timeline: Recording) -> dict[str, Any]:
    """By phase: live bytes after each allocation of the second step, [moments, categories]."""
    lines = timeline.live_by_category()
    table = np.array([lines[name] for name in CATEGORIES], dtype=float).T
    ends = [mark.at for mark in timeline.marks[1:]] + [len(timeline.events)]
    chosen: dict[str, list[int]] = {}
    for mark, end in zip(timeline.marks, ends, strict=True):
        if mark.phase in PHASES and mark.step == (0 if mark.phase == "load" else NUM_STEPS):
            events = chosen.setdefault(mark.phase, [])
            events += [at for at in range(mark.at, end) if timeline.events[at] >= 0]
    return {phase: table[events] for phase, events in chosen.items() if events}


def _apart(traced: TraceResult) -> dict[str, Any]:
    """The phase that comes after the timeline's end, as its one highest moment."""
    return {
        phase: np.array([[peak.terms[name] for name in CATEGORIES]], dtype=float)
        for phase, peak in traced.phases.items()
        if phase == RESUME
    }


def _divide(traces: _Traces, first: Shape, last: Shape) -> Iterator[Region]:
    """The range as regions of one program each."""
    todo, found = [(first, last)], 0
    while todo:
        (rows, shortest), (most_rows, longest) = todo.pop()
        lengths = (shortest, (shortest + longest) // 2, longest)
        programs = {(b, n): traces.at((b, n)).program for b in (rows, most_rows) for n in lengths}
        if len(set(programs.values())) == 1:
            found += 1
            if found > MOST_REGIONS:
                raise NotModelledError(
                    "the step changes with the batch too often to be described by coefficients"
                )
            yield _region(traces, (rows, most_rows), lengths)
        elif any(programs[rows, n] != programs[most_rows, n] for n in lengths):
            todo += _split_rows(traces, rows, most_rows, lengths)
        else:
            start = next(i for i in (0, 1) if programs[rows, lengths[i]] != programs[rows, lengths[i + 1]])
            switch = _switch(traces, rows, lengths[start], lengths[start + 1])
            todo += [
                ((rows, switch), (most_rows, longest)),
                ((rows, shortest), (most_rows, switch - 1)),
            ]


def _split_rows(
    traces: _Traces, rows: int, most_rows: int, lengths: Iterable[int]
) -> list[tuple[Shape, Shape]]:
    """A single row by itself: many operators needn't copy it."""
    shortest, _, longest = lengths
    if rows > 1 or most_rows == rows:
        raise NotModelledError(
            "the step changes with the number of rows in a way that coefficients can't describe"
        )
    return [((2, shortest), (most_rows, longest)), ((1, shortest), (1, longest))]


def _switch(traces: _Traces, rows: int, low: int, high: int) -> int:
    """The first length above `low` whose program isn't `low`'s."""
    program = traces.at((rows, low)).program
    suspects = [n for v in traces.suspects for n in (v, v + 1, v - 1)]
    while high - low > 1:
        probe = next((n for n in suspects if low < n < high), (low + high) // 2)
        if traces.at((rows, probe)).program == program:
            low = probe
        else:
            high = probe
    return high


def _region(traces: _Traces, sizes: tuple[int, int], lengths: tuple[int, int, int]) -> Region:
    nodes = [traces.at((b, n)).moments for b in sizes for n in lengths]
    phases = {}
    for phase in nodes[0]:
        tables = [node[phase] for node in nodes]
        if len({len(table) for table in tables}) > 1:
            tables = [table[[table.sum(axis=1).argmax()]] for table in tables]
        # [moments, categories, nodes]
        values = np.stack(tables, axis=2)
        kept = _undominated(_bernstein(values.sum(axis=1), lengths))
        phases[phase] = tuple(
            dict(zip(CATEGORIES, map(tuple, values[i].tolist()), strict=True)) for i in kept
        )
    return Region(sizes=sizes, lengths=lengths, phases=phases)


def _bernstein(totals: Any, lengths: tuple[int, int, int]) -> Any:
    """Values at the nodes -> Bernstein coefficients in the length: where all of one are larger, so is its polynomial."""
    low, middle, high = lengths
    found = totals.copy()
    if not low < middle < high:
        return found
    t = (middle - low) / (high - low)
    for size in (0, 3):
        ends = (1 - t) ** 2 * totals[:, size] + t**2 * totals[:, size + 2]
        found[:, size + 1] = (totals[:, size + 1] - ends) / (2 * t * (1 - t))
    return found


def _undominated(coefficients: Any) -> list[int]:
    """The rows that no other row reaches in all columns."""
    left = np.argsort(-coefficients.sum(axis=1), kind="stable")
    kept = []
    while len(left):
        kept.append(int(left[0]))
        left = left[(coefficients[left] > coefficients[left[0]]).any(axis=1)]
    return kept


def _check(traces: _Traces, regions: Iterable[Region]) -> tuple[float, list[Shape]]:
    """The largest error at a point of each region that took no part. Raises NotModelledError where it is too large."""
    worst, points = 0.0, []
    for region in regions:
        shape = _between(region)
        traced = {p: m.sum(axis=1).max() for p, m in traces.at(shape).moments.items()}
        predicted = {p: sum(terms.values()) for p, terms in region.at(*shape).items()}
        worst = max(worst, *(abs(predicted[p] / traced[p] - 1) for p in traced))
        points.append(shape)
    if worst > MOST_OFF:
        raise NotModelledError(
            f"coefficients don't describe this architecture: off by {worst:.1%} at a traced point "
            f"(at most {MOST_OFF:.1%}); nothing was kept"
        )
    return worst, points


def _between(region: Region) -> Shape:
    """A shape inside, off the nodes where there is room."""
    shortest, middle, _ = region.lengths
    first, last = region.sizes
    return first + (last - first) // 5, shortest + (middle - shortest) // 3


def _facts(setup: TrainSetup, *, longest: int) -> dict[str, Any]:
    """What an estimate needs beside the phases."""
    plain = build_model(
        setup.with_(method="full", quant=None, checkpointing="none", optimizer_in_backward=False), meta=True
    )
    trained = [p for p in build_model(setup, meta=True).parameters() if p.requires_grad]
    rule = find_optimizer(setup.optimizer)
    config = load_config(setup, None)
    text = config.get_text_config()
    return {
        "model": {
            "name": setup.model_label,
            "model_type": config.model_type,
            "architecture": _architecture(setup, config),
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            "max_positions": longest,
            "num_params": sum(p.numel() for p in plain.parameters()),
        },
        "trained_bytes": sum(p.numel() * p.element_size() for p in trained),
        "host_states_bytes": sum(rule.host_state_bytes(p.numel(), p.element_size()) for p in trained),
    }


def _architecture(setup: TrainSetup, config: Any) -> str:
    if config.is_encoder_decoder:
        return "encoder-decoder"
    return "encoder" if setup.objective == "mlm" else "decoder"


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


def _to_json(region: Region) -> dict[str, Any]:
    return {"sizes": region.sizes, "lengths": region.lengths, "phases": region.phases}
