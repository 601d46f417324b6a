"""What the ranks of a run share, without processes."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.batching import BatchPlan
from bench.world import World, joined
from planner.errors import DataError, UnknownNameError, UsageError
from tiny_llama import tiny_setup

pytestmark = pytest.mark.train


def rank_of(rank: int, size: int) -> World:
    world = World()
    world.rank, world.size = rank, size
    return world


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32))
def test_ranks_share_the_batches_of_one_process(num_rows, micro_batch_size, grad_accum_steps, size, seed):
    plan = BatchPlan(
        rows=tuple((n,) for n in range(num_rows)),
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps * size,
        seed=seed,
    )
    for step in range(2 * plan.num_steps_per_epoch):
        whole = plan.micro_batches(step)
        shares = [rank_of(rank, size).share(whole) for rank in range(size)]
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) <= grad_accum_steps
        taken = [batch for share in shares for batch in share if batch is not None]
        assert sorted(taken) == sorted(whole)


def test_as_many_processes_as_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="one of 4 processes"), joined(tiny_setup()):
        pass


@pytest.mark.parametrize(
    "error", [DataError("a.jsonl", "broken", 3), UnknownNameError("GPU", "rtx", ["rtx 4090"])]
)
def test_errors_travel_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))
