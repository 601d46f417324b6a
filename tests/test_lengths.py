"""Row lengths -> padding, packing, steps and hours: held against counting by hand and against random batches."""

import itertools
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.catalog import find_gpu
from planner.char_lengths import estimated_lengths, spread_by_length
from planner.dataset import Message, Row
from planner.estimate import estimate, resolve
from planner.lengths import DataLengths
from planner.run_length import length_by_lengths
from planner.run_time import forward_share, run_time
from planner.setup import TrainSetup
from planner.specs import Machine

samples = st.lists(st.integers(1, 400), min_size=1, max_size=6)


def known(sample, num_rows=100):
    return DataLengths.of(sample, num_rows=num_rows, source="counted")


@settings(max_examples=60)
@given(sample=samples, batch=st.integers(1, 3), seq_len=st.integers(1, 500))
def test_padding_is_what_all_possible_batches_have_on_average(sample, batch, seq_len):
    batches = itertools.product([min(n, seq_len) for n in sample], repeat=batch)
    expected = statistics.fmean(max(rows) for rows in batches)
    assert known(sample).padded_mean(seq_len, batch) == pytest.approx(expected)


@given(sample=samples, seq_len=st.integers(400, 1000))
def test_packed_rows_fill_sequences_between_perfectly_and_one_each(sample, seq_len):
    share = known(sample).packed_share(seq_len)
    assert sum(sample) / seq_len / len(sample) <= share <= 1


@given(sample=samples, seq_len=st.integers(1, 400))
def test_what_is_cut_is_counted(sample, seq_len):
    lengths = known(sample)
    kept = sum(min(n, seq_len) for n in sample)
    assert lengths.share_lost(seq_len) == pytest.approx(1 - kept / sum(sample))
    assert lengths.share_truncated(seq_len) == sum(n > seq_len for n in sample) / len(sample)
    pieces = lengths.cut(seq_len)
    assert pieces.longest <= seq_len
    assert pieces.num_rows * pieces.mean == pytest.approx(100 * lengths.mean, rel=0.01, abs=seq_len)


def test_what_isnt_known_is_unknown():
    bare = DataLengths(num_rows=9, mean=10.0, p50=9, p99=30, longest=40, source="a summary")
    assert bare.share_truncated(40) == 0.0
    assert bare.share_truncated(39) is None
    assert bare.share_lost(39) is None


def chat(text):
    turns = (Message(role="user", content="Hi"), Message(role="assistant", content=text))
    return Row(messages=turns, line=1, path="d.jsonl")


@pytest.mark.parametrize(("text", "tokens"), [("word " * 400, 400), ("今天天气真好" * 50, 200)])
def test_lengths_by_characters_hold_what_tokenizers_say(text, tokens):
    """English words with their blank are one token each in every large vocabulary; Chinese has 0.6 to 0.9 per character."""
    found = estimated_lengths([chat(text)] * 3)
    assert found.is_estimated
    assert "estimated" in found.source
    assert found.mean * found.low_factor <= tokens + 40 <= found.mean * found.high_factor + 40
    assert found.longest >= tokens


def test_a_sample_holds_the_longest_row_and_all_sizes():
    rows = [chat("x" * n) for n in range(1000)]
    chosen = [row.num_chars - 2 for row in spread_by_length(rows, 50)]
    assert len(chosen) == 50
    assert chosen[-1] == 999
    assert statistics.fmean(chosen) == pytest.approx(499.5, rel=0.05)


MODEL = "smollm2-135m"
MACHINE = Machine(gpu=find_gpu("rtx-4090"))


def timed(lengths, tokens=None, **fields):
    setup = TrainSetup(model=MODEL, method="qlora", seq_len=512, grad_accum_steps=4, **fields)
    found = estimate(setup, MACHINE)
    return found, run_time(setup, found.time, MACHINE, resolve(setup), lengths, tokens)


def test_full_rows_take_the_steps_times_the_step():
    found, run = timed(known([512] * 10, num_rows=1000), micro_batch_size=2)
    assert run.length.low_steps == run.length.high_steps == -(-950 // 8)
    assert run.train_s.low == pytest.approx(run.length.low_steps * found.time.low_step_s)
    assert run.filling.padding_share == 0
    # two passes over 50 rows, each a half of what it costs to train on them
    assert run.eval_s.high == pytest.approx(2 * 50 / 8 * forward_share(found.setup) * found.time.high_step_s)
    assert run.total_s.high == run.train_s.high + run.eval_s.high + run.save_s.high


def test_short_rows_take_less_and_packing_less_still():
    lengths = known([32, 64, 96, 128, 256, 512] * 4, num_rows=2400)
    _, full = timed(known([512] * 10, num_rows=2400), micro_batch_size=4)
    _, padded = timed(lengths, micro_batch_size=4)
    _, packed = timed(lengths, micro_batch_size=4, packing=True)
    # where launches bound a step, shorter rows save nothing
    assert packed.train_s.high < padded.train_s.high <= full.train_s.high
    assert packed.filling.packing_gain > 1
    assert packed.tokens.low == pytest.approx(2280 * lengths.mean)


def test_a_sample_makes_a_range_and_no_data_no_hours():
    unsure = replace(known([100, 200, 300]), low_factor=0.9, high_factor=1.1)
    setup = TrainSetup(model=MODEL, packing=True, seq_len=512)
    length = length_by_lengths(setup, unsure)
    assert length.low_steps < length.high_steps
    assert timed(None)[1] is None
    assert timed(None, max_steps=7)[1].length.high_steps == 7
    assert timed(None, 51_200)[1].length.high_steps == 25
