"""The training step: what it computes doesn't depend on how it is cut into micro-batches, chunks or hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench import loss as losses
from bench.build import build_model, trained_parameters
from bench.data import Example
from bench.evaluate import evaluate
from bench.optim import build_optimizer, build_schedule
from bench.signals import StopRequestedError
from bench.step import TrainStep, no_phase
from planner.errors import SetupError
from tiny_llama import CONFIG, VOCAB, count_trained, random_batch, tiny_setup

pytestmark = pytest.mark.train

GEMMA2 = {
    **{k: v for k, v in CONFIG.items() if k != "architectures"},
    "model_type": "gemma2",
    "head_dim": 16,
    "final_logit_softcapping": 5.0,
}
PHI = {
    **{k: v for k, v in CONFIG.items() if k != "architectures"},
    "model_type": "phi",
    "tie_word_embeddings": False,
}


def make_step(**changes: Any) -> TrainStep:
    setup = tiny_setup(**changes)
    model = build_model(setup)
    return TrainStep(setup, model, build_optimizer(setup, model), schedule=build_schedule(setup, 100))


def gradients(setup: Any, model: Any, *batches: Any) -> dict[str, torch.Tensor]:
    """The step's gradients before they are clipped."""
    found: dict[str, torch.Tensor] = {}

    def keep(m: Any) -> None:
        found.update({n: p.grad.clone() for n, p in trained_parameters(m).items()})

    step = TrainStep(setup, model, build_optimizer(setup, model), on_gradients=keep)
    step(batches, num_items=count_trained(*batches))
    return found


def train_losses(step: TrainStep, num_steps: int = 8, **shape: Any) -> list[float]:
    batch = random_batch(**shape)
    return [float(step([batch], num_items=count_trained(batch)).loss) for _ in range(num_steps)]


RECIPES = [
    {"method": "full"},
    {"method": "full", "weights_dtype": "bfloat16"},
    {"method": "full", "autocast": "bfloat16"},
    {"method": "full", "weights_dtype": "bfloat16", "master_weights": "float32"},
    {"method": "full", "optimizer_in_backward": True},
    {"method": "full", "optimizer_in_backward": True, "checkpointing": "full", "loss": "chunked"},
    {"method": "full", "compile": False, "attention": "eager"},
    {"method": "lora"},
    {"method": "lora", "weights_dtype": "bfloat16", "adapter_dtype": "bfloat16", "dropout": 0.1},
    {"method": "lora", "weights_dtype": "bfloat16", "autocast": "bfloat16", "checkpointing": "full"},
    {"method": "lora", "autocast": "float16"},
    {"method": "qlora", "weights_dtype": "bfloat16"},
    {"method": "qlora", "weights_dtype": "bfloat16", "quant": "int8", "loss": "chunked"},
    {"method": "qlora", "weights_dtype": "bfloat16", "quant": "fp4", "autocast": "bfloat16"},
    {"method": "qlora", "weights_dtype": "bfloat16", "kbit_upcast": False, "checkpointing": "full"},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join(map(str, r.values())))
def test_the_loss_falls_under_every_recipe(recipe: dict[str, Any]) -> None:
    found = train_losses(make_step(**recipe))
    assert found[0] == pytest.approx(5.55, abs=0.05), "random weights predict uniformly: ln 256"
    assert found[-1] < found[0] - 0.4


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", "adamw-fused", "adamw-8bit", "paged-adamw-8bit", "adafactor", "lion", "lion-8bit", "sgd"],
)
def test_the_loss_falls_with_every_optimizer(optimizer: str) -> None:
    rate = 1.0 if optimizer == "sgd" else 5e-3
    found = train_losses(make_step(method="full", optimizer=optimizer, learning_rate=rate))
    assert found[-1] < found[0] - 0.3


def test_accumulation_gives_the_gradients_of_the_whole_batch() -> None:
    """Micro-batches with different numbers of trained tokens: each token must weigh the same."""
    setup = tiny_setup(method="full")
    parts = [random_batch(1, seed=i, untrained=4 + 7 * i) for i in range(4)]
    whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    at_once = gradients(setup, build_model(setup), whole)
    in_parts = gradients(setup, build_model(setup), *parts)
    for name, gradient in at_once.items():
        assert torch.allclose(gradient, in_parts[name], rtol=1e-4, atol=1e-7), name


def test_accumulated_loss_is_the_mean_over_all_trained_tokens() -> None:
    parts = [random_batch(1, seed=i, untrained=4 + 7 * i) for i in range(4)]
    whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    num_trained = count_trained(whole)
    in_parts = make_step(method="full")(parts, num_items=num_trained)
    at_once = make_step(method="full")([whole], num_items=num_trained)
    model = build_model(tiny_setup(method="full"))
    logits = model(input_ids=whole["input_ids"]).logits[:, :-1].reshape(-1, 256).detach()
    expected = torch.nn.functional.cross_entropy(
        logits, whole["labels"][:, 1:].reshape(-1), ignore_index=-100
    )
    assert float(in_parts.loss) == pytest.approx(float(at_once.loss), rel=1e-5)
    assert float(at_once.loss) == pytest.approx(float(expected), rel=1e-5)


HEADS = {
    "tied": ({}, {"method": "full"}),
    "untied": ({"tie_word_embeddings": False}, {"method": "full"}),
    "frozen": ({}, {"method": "lora"}),
    "dropout": ({}, {"method": "lora", "dropout": 0.5}),
    "softcap": (GEMMA2, {"method": "full", "attention": "eager"}),
    "softcap-frozen": (GEMMA2, {"method": "lora", "attention": "eager"}),
    "bias": (PHI, {"method": "full"}),
    "checkpointed": ({}, {"method": "full", "checkpointing": "full"}),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_loss_is_the_full_loss(head: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOSS_CHUNK_TOKENS", chunk)
    config, changes = HEADS[head]
    setup = tiny_setup(model={**CONFIG, **config}, **changes)
    batch = random_batch(3, 20, untrained=5)
    model = build_model(setup)
    losses.check_head(model)
    values = {
        kind: losses.LOSSES[kind](model.eval(), batch, count_trained(batch), no_phase).item()
        for kind in ("full", "chunked")
    }
    assert values["chunked"] == pytest.approx(values["full"], rel=1e-6)
    model.train()
    full = gradients(setup, build_model(setup), batch)
    chunked = gradients(setup.with_(loss="chunked"), build_model(setup), batch)
    assert full.keys() == chunked.keys()
    for name, gradient in full.items():
        assert torch.allclose(gradient, chunked[name], rtol=1e-3, atol=1e-7), name


def test_chunked_loss_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of tokens x vocabulary elements or more is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.num_elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tensors = out if isinstance(out, tuple | list) else [out]
            sizes = [t.numel() for t in tensors if isinstance(t, torch.Tensor)]
            self.num_elements = max([self.num_elements, *sizes])
            return out

    monkeypatch.setattr(losses, "LOSS_CHUNK_TOKENS", 8)
    largest = {}
    for kind in ("full", "chunked"):
        step = make_step(model={**CONFIG, "vocab_size": 4096}, method="lora", loss=kind)
        with Largest() as mode:
            train_losses(step, 1, num_rows=4)
        largest[kind] = mode.num_elements
    assert largest["full"] == 4 * 32 * 4096
    assert largest["chunked"] == 64 * 4096, "the embedding itself"


def test_fused_loss_says_what_it_needs() -> None:
    with pytest.raises(Exception, match=r"liger|CUDA"):
        train_losses(make_step(method="lora", loss="fused"), 1)


def test_adapter_on_the_head_refuses_chunked_loss() -> None:
    setup = tiny_setup(model={**CONFIG, "tie_word_embeddings": False}, targets=("lm_head",), loss="chunked")
    with pytest.raises(SetupError, match="use full"):
        losses.check_head(build_model(setup))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_step_in_the_backward_is_the_same_step(method: str) -> None:
    plain = make_step(method=method, max_grad_norm=None)
    fused = make_step(method=method, optimizer_in_backward=True)
    assert train_losses(plain) == pytest.approx(train_losses(fused), rel=1e-6)
    assert all(p.grad is None for p in fused.model.parameters())


def test_checkpointing_changes_nothing() -> None:
    assert train_losses(make_step(checkpointing="full")) == train_losses(make_step(checkpointing="none"))


def test_master_weights_keep_updates_that_bfloat16_loses() -> None:
    """At a rate of 1e-5, an update is below half of bfloat16's spacing for weights above 0.005."""
    changes = {"method": "full", "weights_dtype": "bfloat16", "learning_rate": 1e-5}
    moved = {}
    for master in ("none", "float32"):
        step = make_step(master_weights=master, **changes)
        before = {n: p.detach().clone() for n, p in trained_parameters(step.model).items()}
        train_losses(step, 40)
        after = trained_parameters(step.model)
        moved[master] = sum(int((after[n] != b).sum()) for n, b in before.items())
    assert moved["float32"] > 1.5 * moved["none"]


def test_clipping_bounds_the_update() -> None:
    step = make_step(method="full", optimizer="sgd", learning_rate=1.0, max_grad_norm=1e-3)
    before = [p.detach().clone() for p in step.parameters]
    batch = random_batch()
    norm = step([batch], num_items=count_trained(batch)).grad_norm
    moved = torch.sqrt(sum(((p - b) ** 2).sum() for p, b in zip(step.parameters, before, strict=True)))
    assert float(norm) > 0.1
    assert float(moved) == pytest.approx(1e-3, rel=0.01)


def test_learning_rate_follows_the_schedule() -> None:
    setup = tiny_setup(schedule="linear", warmup_steps=2)
    model = build_model(setup)
    schedule = build_schedule(setup, 6)
    step = TrainStep(setup, model, build_optimizer(setup, model), schedule=schedule)
    batch = random_batch()
    rates = [step([batch], num_items=count_trained(batch)).learning_rate for _ in range(6)]
    assert rates == [schedule(i) for i in range(6)]


def test_phases_come_in_order() -> None:
    seen = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        seen.append(name)
        yield

    step = make_step()
    step.phase = phase
    batch = random_batch()
    step([batch, batch], num_items=2 * count_trained(batch))
    assert seen == ["forward", "loss", "backward"] * 2 + ["optimizer"]


def test_a_stop_between_micro_batches_leaves_the_step_untaken() -> None:
    step = make_step()
    before = [p.detach().clone() for p in step.parameters]
    step.should_stop = lambda: True
    batch = random_batch()
    with pytest.raises(StopRequestedError):
        step([batch, batch], num_items=2 * count_trained(batch))
    assert all(torch.equal(p, b) for p, b in zip(step.parameters, before, strict=True))
    assert all(p.grad is None for p in step.parameters)
    assert step.num_steps_done == 0


def test_dropout_follows_the_seed() -> None:
    def run(seed: int) -> list[float]:
        return train_losses(make_step(dropout=0.5, seed=seed), 4)

    assert run(3) == run(3)


@pytest.mark.slow
def test_losses_are_those_of_transformers_trainer(tmp_path: Any) -> None:
    """Same model, batches, optimizer and schedule; two micro-batches per step with unequal trained tokens."""
    import transformers

    setup = tiny_setup(method="full", optimizer="adamw-fused", grad_accum_steps=2, learning_rate=1e-3)
    num_steps = 5
    batches = [random_batch(2, seed=i, untrained=4 + 5 * (i % 3)) for i in range(2 * num_steps)]
    model = build_model(setup)
    step = TrainStep(setup, model, build_optimizer(setup, model), schedule=build_schedule(setup, num_steps))
    own = []
    for i in range(num_steps):
        pair = batches[2 * i : 2 * i + 2]
        own.append(float(step(pair, num_items=count_trained(*pair)).loss))

    rows = [{k: b[k][i] for k in b} for b in batches for i in range(2)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=num_steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        train_sampling_strategy="sequential",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=build_model(setup), args=arguments, train_dataset=rows)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert own == pytest.approx(theirs, abs=2e-4)


@pytest.mark.parametrize("quant", ["nf4-double", "fp4", "int8"])
def test_an_evaluation_before_training_changes_no_step(quant: str) -> None:
    setup = tiny_setup(method="qlora", quant=quant, weights_dtype="bfloat16")
    batch = random_batch()

    def losses_after(evaluates: bool) -> list[float]:
        model = build_model(setup)
        if evaluates:
            with torch.no_grad():
                model.eval()(input_ids=batch["input_ids"])
            model.train()
        return train_losses(TrainStep(setup, model, build_optimizer(setup, model)))

    assert losses_after(True) == losses_after(False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "chunked"},
        {"packing": True},
        {"eval_batch_size": 1},
        {"method": "prompt", "num_virtual_tokens": 4},
    ],
)
def test_token_accuracy_is_the_share_of_labels_that_are_likeliest(changes: dict[str, Any]) -> None:
    ids = [
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length))
        for length in (9, 14, 5)
    ]
    step = make_step(**changes)
    examples = []
    num_right = 0
    for tokens in ids:
        with torch.no_grad():
            likeliest = step.model(input_ids=tokens[None]).logits[0, -len(tokens) :].argmax(-1)
        # every third label is the one that the model holds for likeliest, the others are the next token's
        labels = torch.cat(
            (
                tokens[:1] * 0 - 100,
                torch.where(torch.arange(1, len(tokens)) % 3 == 0, likeliest[:-1], tokens[1:]),
            )
        )
        num_right += int((labels[1:] == likeliest[:-1]).sum())
        examples.append(
            Example(input_ids=tokens.int().numpy(), labels=labels.int().numpy(), group=str(len(tokens)))
        )
    found = evaluate(step, examples, pad_id=0)
    assert num_right > 5
    assert found.token_accuracy == pytest.approx(num_right / sum(len(tokens) - 1 for tokens in ids))
