"""DPO: its loss and gradients, its reference, its run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import reference
from bench.build import build_model, check_runnable, trained_parameters
from bench.data import IGNORE_INDEX, Example
from bench.logprobs import LOG_PROBS
from bench.objectives import PreferenceObjective
from bench.optim import build_optimizer
from bench.reference import with_reference, without_reference
from bench.rundata import RunData, run_data
from bench.step import TrainStep, no_phase
from bench.train import train
from planner.errors import NotModelledError, SetupError
from planner.setup import TrainSetup
from tiny_llama import VOCAB, save_tiny_model, tiny_setup, write_pairs

pytestmark = pytest.mark.train


def dpo_setup(**changes: Any) -> TrainSetup:
    return tiny_setup(**{"objective": "dpo", "method": "full", "micro_batch_size": 4, **changes})


def random_pairs(num_pairs: int = 4, seed: int = 0) -> list[Example]:
    """Pairs of a common prompt and answers of different lengths."""
    generator = np.random.default_rng(seed)
    pairs = []
    for number in range(num_pairs):
        prompt = generator.integers(3, VOCAB, 6, dtype=np.int32)
        sides = []
        for _ in range(2):
            ids = np.concatenate(
                (prompt, generator.integers(3, VOCAB, generator.integers(4, 18), dtype=np.int32))
            )
            labels = np.where(np.arange(len(ids)) < 6, IGNORE_INDEX, ids).astype(np.int32)
            sides.append(Example(input_ids=ids.astype(np.int32), labels=labels, group=str(number)))
        pairs.append(replace(sides[0], rejected=sides[1]))
    return pairs


def make_step(setup: TrainSetup) -> TrainStep:
    model = build_model(setup)
    return TrainStep(setup, model, build_optimizer(setup, model))


def referenced(step: TrainStep, data: RunData, folder: Path) -> RunData:
    return with_reference(step, data, cache_dir=folder)


def gradients_of(setup: TrainSetup, data: RunData) -> tuple[Any, dict[str, torch.Tensor]]:
    """What one step of the whole data gives, at a learning rate of nothing."""
    found: dict[str, torch.Tensor] = {}
    step = make_step(setup)
    step.on_gradients = lambda model: found.update(
        {name: p.grad.clone() for name, p in trained_parameters(model).items()}
    )
    batch = replace(
        data, setup=setup, batches=replace(data.batches, micro_batch_size=setup.micro_batch_size)
    ).step_batch(0, torch.device("cpu"))
    assert batch.num_items == len(data.train)
    return step(batch.micro_batches, num_items=batch.num_items), found


def moved(data: RunData, by: float = 3.0) -> RunData:
    """Another reference than the model itself, so that pairs weigh differently."""
    train_pairs = [
        replace(pair, reference_logp=by * number, rejected=replace(pair.rejected, reference_logp=-2.0))
        for number, pair in enumerate(data.train)
        if pair.rejected
    ]
    return replace(data, train=train_pairs)


def pair_data(setup: TrainSetup, pairs: list[Example]) -> RunData:
    data = run_data(setup.with_(eval_fraction=0.0), pairs, pad_id=0)
    return replace(data, batches=replace(data.batches, grad_accum_steps=len(pairs)))


@pytest.mark.parametrize(
    "changes", [{}, {"weights_dtype": "bfloat16"}, {"autocast": "bfloat16"}, {"method": "lora"}]
)
def test_chunks_give_the_loss_and_gradients_of_all_logits(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.loss.LOSS_CHUNK_TOKENS", 7)
    setup = dpo_setup(**changes)
    data = moved(pair_data(setup, random_pairs()))
    (whole, expected), (chunked, found) = (
        gradients_of(setup.with_(loss=loss), data) for loss in ("full", "chunked")
    )
    tolerance = 1e-5 if setup.weights_dtype == "float32" and not setup.autocast else 0.05
    assert float(chunked.loss) == pytest.approx(float(whole.loss), rel=tolerance)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1e-12
        assert float((found[name] - gradient).abs().max()) <= tolerance * scale, name


def test_how_pairs_are_cut_into_micro_batches_changes_nothing() -> None:
    data = moved(pair_data(dpo_setup(), random_pairs(5)))
    at_once, expected = gradients_of(dpo_setup(micro_batch_size=5), data)
    in_parts, found = gradients_of(dpo_setup(micro_batch_size=2), data)
    assert float(in_parts.loss) == pytest.approx(float(at_once.loss), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    for name, value in at_once.metrics.items():
        assert float(in_parts.metrics[name]) == pytest.approx(float(value), rel=1e-5)


def test_the_loss_begins_at_ln_2_and_its_metrics_at_0(tmp_path: Path) -> None:
    setup = dpo_setup(method="lora", dropout=0.3)
    step = make_step(setup)
    data = referenced(step, pair_data(setup, random_pairs()), tmp_path)
    batch = data.step_batch(0, torch.device("cpu"))
    result = step(batch.micro_batches, num_items=batch.num_items)
    assert float(result.loss) == pytest.approx(math.log(2), abs=1e-5)
    assert set(result.metrics) == {
        "rewards_chosen",
        "rewards_rejected",
        "rewards_margin",
        "rewards_accuracy",
    }
    assert float(result.metrics["rewards_margin"]) == pytest.approx(0, abs=1e-4)


def test_a_log_probability_is_the_sum_over_the_answer_s_tokens() -> None:
    setup = dpo_setup()
    model = build_model(setup)
    [pair] = random_pairs(1)
    ids, labels = torch.tensor(pair.input_ids[None]), torch.tensor(pair.labels[None].astype(np.int64))
    logits = model(input_ids=ids.long()).logits[0].log_softmax(-1).detach()
    expected = sum(float(logits[at - 1, ids[0, at]]) for at in range(6, ids.shape[1]))
    batch = {"input_ids": ids.long(), "labels": labels}
    for kind in LOG_PROBS.values():
        logps = kind.of(model, kind.forward(model, batch), batch)
        assert float(logps.sum().detach()) == pytest.approx(expected, rel=1e-5)


def test_the_reference_is_computed_once_for_a_model_and_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = dpo_setup()
    data = pair_data(setup, random_pairs())
    first = referenced(make_step(setup), data, tmp_path)
    assert all(
        s.reference_logp is not None and s.reference_logp < 0 for e in first.train for s in e.sequences
    )

    def values(found: RunData) -> list[list[Any]]:
        return [[s.reference_logp for s in e.sequences] for e in found.train]

    with monkeypatch.context() as patch:
        patch.setattr(reference, "_compute", lambda *_: pytest.fail("computed again"))
        assert values(referenced(make_step(setup), data, tmp_path)) == values(first)
    assert values(referenced(make_step(setup.with_(seed=1)), data, tmp_path)) != values(first)
    for file in (tmp_path / "references").iterdir():
        file.write_bytes(b"torn")
    assert values(referenced(make_step(setup), data, tmp_path)) == values(first)
    assert "is damaged" in capsys.readouterr().err


def test_measuring_needs_no_reference() -> None:
    data = without_reference(pair_data(dpo_setup(), random_pairs()))
    assert {s.reference_logp for e in data.train for s in e.sequences} == {0.0}


def test_what_dpo_refuses() -> None:
    with pytest.raises(SetupError, match="fused gives no log probability"):
        dpo_setup(loss="fused")
    with pytest.raises(SetupError, match="packed only for"):
        dpo_setup(packing=True)
    with pytest.raises(NotModelledError, match="sft and pretrain and dpo can"):
        check_runnable(tiny_setup(objective="mlm"), "cpu")


def metrics(folder: Path, kind: str) -> list[Mapping[str, Any]]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == kind]


@pytest.mark.parametrize(
    "changes",
    [{"method": "lora"}, pytest.param({"method": "full", "loss": "chunked"}, marks=pytest.mark.slow)],
)
def test_a_run_prefers_what_its_pairs_prefer(tmp_path: Path, changes: dict[str, Any]) -> None:
    setup = dpo_setup(
        model=str(save_tiny_model(tmp_path / "model")),
        data=str(write_pairs(tmp_path / "pairs.jsonl")),
        from_scratch=False,
        seq_len=64,
        eval_fraction=0.2,
        max_steps=8,
        **changes,
    )
    summary = train(setup, tmp_path / "run", progress=False)
    steps, (before, after) = metrics(tmp_path / "run", "step"), metrics(tmp_path / "run", "eval")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[-1]["rewards_margin"] > 0.5 > abs(steps[0]["rewards_margin"])
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert after["loss"] < before["loss"] and after["rewards_accuracy"] > before["rewards_accuracy"]
    assert "perplexity" not in after
    assert summary.eval_after["rewards_margin"] == after["rewards_margin"]
    assert summary.num_tokens == sum(entry["tokens"] for entry in steps)
    assert all("yes" in sample["expected"] for sample in summary.sample_after)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_loss_and_gradients_are_those_of_trl(tmp_path: Path, loss: str) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder = save_tiny_model(tmp_path / "model")
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl", 6).read_text().splitlines()]
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{k: [{"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected")},
        }
        for row in rows
    ]
    args = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.3,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=6,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(chats),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    theirs = next(iter(trainer.get_train_dataloader()))
    theirs["ref_chosen_logps"] = theirs["ref_chosen_logps"] + torch.arange(6.0)
    model = trainer.model.train()
    expected = trainer._compute_loss(model, theirs, return_outputs=False)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    batch = {
        "input_ids": theirs["input_ids"],
        "attention_mask": theirs["attention_mask"],
        "labels": theirs["input_ids"].masked_fill(theirs["completion_mask"] == 0, IGNORE_INDEX),
        "reference_logps": torch.cat((theirs["ref_chosen_logps"], theirs["ref_rejected_logps"])),
    }
    objective = PreferenceObjective(dpo_setup(dpo_beta=0.3, loss=loss))
    ours = objective.loss(model, batch, 6, no_phase)
    ours.backward()
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-6)
    margins = trainer._metrics["train"]["rewards/margins"]
    assert float(objective.take_metrics()["rewards_margin"]) == pytest.approx(margins[-1], rel=1e-4)
