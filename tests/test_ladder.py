"""Running out of memory: what counts as it, and what is tried next."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.ladder import (
    PhaseNow,
    Shortage,
    attempt,
    is_out_of_memory,
    is_repeatable,
    next_eval_rung,
    next_rung,
)
from bench.remedy import nothing_left
from planner.setup import TrainSetup
from planner.specs import GpuProfile, Machine
from tiny_llama import tiny_setup

pytestmark = pytest.mark.train

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.25 GiB of which 512.00 MiB "
    "is free. Including non-PyTorch memory, this process has 78.70 GiB memory in use."
)
PIECES = CUDA.replace("512.00 MiB", "3.00 GiB")


@pytest.mark.parametrize(
    ("error", "missing_bytes"),
    [
        (RuntimeError(CPU), 4096),
        (torch.OutOfMemoryError(CUDA), 2 * 2**30),
        (torch.OutOfMemoryError(PIECES), 1),
        (MemoryError(), None),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
    ],
)
def test_every_allocator_s_refusal_is_read(error: Exception, missing_bytes: int | None) -> None:
    assert is_out_of_memory(error)
    assert Shortage.of(str(error), "forward").missing_bytes == missing_bytes


def test_other_errors_are_none() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError, match="mat1"):
        attempt(lambda: (_ for _ in ()).throw(error), lambda: "forward")


def test_real_allocators_are_caught_and_what_the_attempt_held_is_free() -> None:
    held: list[Any] = []
    phase = PhaseNow()

    def deep() -> None:
        tensor = torch.ones(10)
        held.append(weakref.ref(tensor))
        with phase("backward"):
            torch.empty(10**15)

    found = attempt(lambda: deep(), lambda: phase.name)
    assert found == Shortage(phase="backward", missing_bytes=4 * 10**15)
    assert held[0]() is None


@given(st.integers(1, 64), st.integers(1, 16), st.sampled_from(("none", "full")))
def test_the_ladder_keeps_the_batch_and_ends(size: int, accumulation: int, checkpointing: str) -> None:
    setup = TrainSetup(micro_batch_size=size, grad_accum_steps=accumulation, checkpointing=checkpointing)
    rungs = [setup]
    while (following := next_rung(rungs[-1])) is not None:
        rungs.append(following)
    assert {rung.global_batch_size for rung in rungs} == {setup.global_batch_size}
    sizes = [rung.micro_batch_size for rung in rungs]
    assert all(b <= a / 2 for a, b in pairwise(sizes) if a != b)
    assert sizes[-1] == 1
    assert rungs[-1].checkpointing == "full"
    # recomputing costs more than smaller steps, so it comes last
    assert all(rung.checkpointing == checkpointing for rung in rungs if rung.micro_batch_size > 1)


def test_an_update_in_the_backward_cannot_accumulate_nor_be_taken_again() -> None:
    setup = TrainSetup(method="full", micro_batch_size=4, optimizer_in_backward=True, checkpointing="none")
    rung = next_rung(setup)
    assert rung == setup.with_(checkpointing="full")
    assert next_rung(rung) is None
    assert is_repeatable(setup, "forward")
    assert not is_repeatable(setup, "backward")
    assert is_repeatable(TrainSetup(), "backward")
    assert not is_repeatable(TrainSetup(), "optimizer")


def test_an_evaluation_only_shrinks_its_own_batch() -> None:
    setup = tiny_setup(micro_batch_size=4)
    rung = next_eval_rung(setup)
    assert rung == setup.with_(eval_batch_size=2)
    assert next_eval_rung(setup.with_(eval_batch_size=1)) is None


def machine(free_bytes: int) -> Machine:
    gpu = GpuProfile(
        name="cpu",
        vendor="intel",
        architecture="x",
        backend="cpu",
        modelled=True,
        memory_bytes=64 * 2**30,
        usable_bytes=free_bytes,
        bf16=True,
        unified_memory=True,
        bitsandbytes=True,
    )
    return Machine(gpu=gpu, free_bytes=free_bytes, is_local=True)


def test_the_end_of_the_ladder_names_a_plan_that_is_predicted_to_fit() -> None:
    from planner.estimate import estimate

    setup = TrainSetup(model="llama-3.1-8b", method="lora", seq_len=4096, weights_dtype="bfloat16")
    shortage = Shortage(phase="loss", missing_bytes=3 * 2**30)
    error = nothing_left(setup, shortage, lambda: machine(60 * 2**30))
    assert error.exit_code == 3
    assert error.short_by_bytes == 3 * 2**30
    words = str(error).partition("predicted to fit, in a new folder: ")[2].replace("--set ", "").split()
    from planner.fields import parse_settings

    fitting = setup.with_(**parse_settings(tuple(words)))
    needed = [estimate(s, machine(60 * 2**30)).memory.device_used_bytes for s in (setup, fitting)]
    assert needed[1] <= needed[0] - 3 * 2**30


def test_where_no_plan_is_known_the_message_says_why() -> None:
    error = nothing_left(
        TrainSetup(model="no/such-model"),
        Shortage(phase="forward", missing_bytes=None),
        lambda: machine(2**30),
    )
    assert "no plan that would fit is known" in str(error)
    assert "no/such-model" in str(error)
