"""A whole run's hours: steps of the lengths that the data really has, evaluations and saves, each as a range.

A step is timed at the positions that its micro-batches have on average: without packing they are padded to their
longest row only, and joined rows have no padding; there each document attends to itself alone. What `finefit train` does by default is counted: an evaluation before and one after, ten saves, and
with pairs of answers one pass for their reference.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from planner.cost import CHECKPOINTS_PER_RUN, Span
from planner.inventory import take_inventory
from planner.lengths import DataLengths
from planner.methods import find_method
from planner.results import Time
from planner.run_length import RunLength, held_out_rows, length_by_lengths, length_by_plan, length_by_tokens
from planner.setup import PAIRED, TrainSetup
from planner.specs import Machine, ModelSpec
from planner.timing import step_time

NUM_EVALS = 2
"""Before and after the run."""
DISK_BYTES_PER_S = Span(low=0.2e9, high=2e9)
"""Assumed for writing checkpoints: from a networked volume to a local NVMe drive."""
FORWARD = 2.0
"""FLOPs of a forward pass per weight and token; a backward has as many again for the gradients of the inputs, and
again for those of trained weights (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filling:
    """What the data makes of the batches; None where the rows' lengths are not known.

    Shares of rows that are cut, of tokens that this loses, and of positions that are padding; `packing_gain` is how
    many times fewer positions packed rows take than as many unpacked ones in a micro-batch.
    """

    truncated_share: float | None = None
    lost_share: float | None = None
    padding_share: float | None = None
    packing_gain: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTime:
    """The parts of a run in seconds. `tokens` are real ones of the whole run, without padding.

    `computes_reference`: pairs of answers are read once more before the first step, which `eval_s` counts.
    """

    length: RunLength
    filling: Filling
    tokens: Span | None
    num_evals: int
    num_saves: int
    train_s: Span | None
    eval_s: Span | None
    save_s: Span | None
    lengths_source: str | None
    computes_reference: bool = False

    @property
    def total_s(self) -> Span | None:
        """All parts; None where no step's time is known."""
        if self.train_s is None or self.save_s is None:
            return None
        known = self.train_s + self.save_s
        return known if self.eval_s is None else known + self.eval_s

    def to_json(self) -> dict[str, Any]:
        """Seconds and shares; None is unknown."""
        return {
            "steps": [self.length.low_steps, self.length.high_steps],
            "steps_source": self.length.source,
            "lengths_source": self.lengths_source,
            **asdict(self.filling),
            "tokens": _ends(self.tokens),
            "num_evals": self.num_evals,
            "num_saves": self.num_saves,
            "train_s": _ends(self.train_s),
            "eval_s": _ends(self.eval_s),
            "save_s": _ends(self.save_s),
            "total_s": _ends(self.total_s),
        }


def _ends(span: Span | None) -> list[float] | None:
    return None if span is None else [span.low, span.high]


def run_time(
    setup: TrainSetup,
    time: Time | None,
    machine: Machine,
    model: ModelSpec,
    lengths: DataLengths | None,
    tokens: float | None = None,
) -> RunTime | None:
    """The whole run of a setup whose full steps take `time`; None where nothing says how many steps it has.

    `tokens` in full sequences are taken where neither the plan nor the data says how long it is.
    """
    if lengths is not None and setup.objective == "pretrain":
        lengths = lengths.cut(setup.seq_len)
    found = _length(setup, lengths, tokens)
    if found is None:
        return None
    positions = positions_per_row(setup, lengths)
    time = _step_time_at(setup, time, positions, lengths, machine, model)
    held_out = 0 if lengths is None else held_out_rows(setup, lengths.num_rows)
    return RunTime(
        length=found,
        filling=_filling(setup, lengths, positions),
        tokens=_tokens(setup, lengths),
        num_evals=NUM_EVALS if held_out else 0,
        num_saves=min(CHECKPOINTS_PER_RUN, found.high_steps),
        train_s=None if time is None else _train_seconds(found, time, lengths, setup),
        eval_s=_eval_seconds(setup, lengths, held_out, positions, time),
        save_s=_save_seconds(setup, model, found),
        lengths_source=None if lengths is None else lengths.source,
        computes_reference=setup.objective in PAIRED,
    )


def _length(setup: TrainSetup, lengths: DataLengths | None, tokens: float | None) -> RunLength | None:
    if lengths is not None:
        return length_by_lengths(setup, lengths)
    planned = length_by_plan(setup)
    return length_by_tokens(setup, tokens) if planned is None and tokens is not None else planned


def positions_per_row(setup: TrainSetup, lengths: DataLengths | None) -> float:
    """Positions of one sequence of a micro-batch on average, padding included."""
    if lengths is None or setup.compile:
        return float(setup.seq_len)
    if setup.joins_rows:
        return lengths.kept_mean(setup.seq_len) / _documents_share(setup, lengths)
    if setup.packing:
        return float(setup.seq_len)
    return lengths.padded_mean(setup.seq_len, setup.micro_batch_size * setup.sequences_per_row)


def _documents_share(setup: TrainSetup, lengths: DataLengths) -> float:
    """Sequences per row of the data."""
    return lengths.packed_share(setup.seq_len) if setup.packing else 1.0


def _step_time_at(
    setup: TrainSetup,
    time: Time | None,
    positions: float,
    lengths: DataLengths | None,
    machine: Machine,
    model: ModelSpec,
) -> Time | None:
    """The time of a step whose sequences have that many positions."""
    if time is None or lengths is None:
        return time
    if setup.packing and setup.joins_rows:
        return _time_of_documents(setup, lengths, machine, model)
    seq_len = max(1, round(positions))
    return time if seq_len == setup.seq_len else time_of_step(setup.with_(seq_len=seq_len), machine, model)


def _time_of_documents(
    setup: TrainSetup, lengths: DataLengths, machine: Machine, model: ModelSpec
) -> Time | None:
    """The same of as many documents as fill the sequences of a micro-batch, none longer than the mean."""
    seq_len = max(1, round(lengths.kept_mean(setup.seq_len)))
    num_documents = max(1, round(setup.micro_batch_size / lengths.packed_share(setup.seq_len)))
    alike = setup.with_(packing=False, micro_batch_size=num_documents, seq_len=seq_len)
    return time_of_step(alike, machine, model)


def time_of_step(setup: TrainSetup, machine: Machine, model: ModelSpec) -> Time | None:
    """A full step's time; None where nothing is known of the card."""
    return step_time(setup, machine, model)


def _train_seconds(length: RunLength, time: Time, lengths: DataLengths | None, setup: TrainSetup) -> Span:
    """Lengths that are known only by a sample or by characters make a step shorter or longer, not a packed one."""
    low, high = length.low_steps * time.low_step_s, length.high_steps * time.high_step_s
    if lengths is None or setup.packing or setup.compile:
        return Span(low=low, high=high)
    return Span(low=low * lengths.low_factor, high=high * lengths.high_factor)


def forward_share(setup: TrainSetup) -> float:
    """Of a step's work, that of one forward pass.

    >>> forward_share(TrainSetup(method="full", checkpointing="none"))
    0.3333333333333333
    """
    trained = FORWARD if find_method(setup.method).trains_base else 0.0
    recomputed = FORWARD if setup.checkpointing == "full" else 0.0
    return FORWARD / (2 * FORWARD + trained + recomputed)


def _eval_seconds(
    setup: TrainSetup, lengths: DataLengths | None, held_out: int, positions: float, time: Time | None
) -> Span | None:
    """Evaluations, and the pass over all rows that computes the reference of pairs of answers."""
    num_rows = NUM_EVALS * held_out
    if lengths is not None and setup.objective in PAIRED:
        num_rows += lengths.num_rows
    if time is None or lengths is None or not num_rows:
        return None
    per_step = setup.global_batch_size * positions
    # packed, or the longest rows first: next to no padding
    share = forward_share(setup) * num_rows * lengths.kept_mean(setup.seq_len) / per_step
    return Span(low=share * time.low_step_s, high=share * time.high_step_s)


def _save_seconds(setup: TrainSetup, model: ModelSpec, length: RunLength) -> Span | None:
    """What was trained and its optimizer's states, each time; None where only traces know the model."""
    if model.is_traced:
        return None
    kept = take_inventory(setup, model)
    size = kept.gradients_bytes + kept.states_bytes + kept.host_states_bytes + kept.master_bytes
    saves = min(CHECKPOINTS_PER_RUN, length.high_steps)
    return Span(low=saves * size / DISK_BYTES_PER_S.high, high=saves * size / DISK_BYTES_PER_S.low)


def _tokens(setup: TrainSetup, lengths: DataLengths | None) -> Span | None:
    """Real tokens that are trained on, over all epochs."""
    if lengths is None:
        return None
    kept = lengths.kept_mean(setup.seq_len)
    rows = setup.epochs * (lengths.num_rows - held_out_rows(setup, lengths.num_rows))
    if setup.max_steps is not None:
        per_sequence = lengths.packed_share(setup.seq_len) if setup.packing else 1.0
        rows = setup.max_steps * setup.global_batch_size / per_sequence
    total = rows * setup.sequences_per_row * kept
    return Span(low=total * lengths.low_factor, high=total * lengths.high_factor)


def _filling(setup: TrainSetup, lengths: DataLengths | None, positions: float) -> Filling:
    if lengths is None:
        return Filling()
    seq_len, kept = setup.seq_len, lengths.kept_mean(setup.seq_len)
    cut = Filling(
        truncated_share=lengths.share_truncated(seq_len),
        lost_share=lengths.share_lost(seq_len),
    )
    if not lengths.sample:
        return cut
    if not setup.packing:
        return replace(cut, padding_share=1 - kept / positions)
    share = lengths.packed_share(seq_len)
    packed = share * positions
    padded = lengths.padded_mean(seq_len, round(setup.micro_batch_size / share))
    return replace(cut, padding_share=1 - kept / packed, packing_gain=padded / packed)
