"""Rows that are joined without padding, and losses that leave out what doesn't train."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import SetupError
from planner.estimate import resolve
from planner.memory import MemoryModel
from planner.setup import TrainSetup
from tiny_llama import CONFIG, tiny_setup

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from bench import attention  # noqa: E402
from bench.attention import check_isolation  # noqa: E402
from bench.batching import micro_batch  # noqa: E402
from bench.build import build_model  # noqa: E402
from bench.data import Example  # noqa: E402
from bench.documents import LEAST_FILL, MULTIPLE, locate  # noqa: E402
from bench.optim import build_optimizer  # noqa: E402
from bench.step import TrainStep  # noqa: E402
from bench.trace.run import trace  # noqa: E402

pytestmark = pytest.mark.train

MISTRAL = {**CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 256}
QWEN = {**CONFIG, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 24}
MODELS = {"llama": CONFIG, "window": MISTRAL, "qk-norm": QWEN}


def examples(*lengths: int) -> list[Example]:
    generator = np.random.default_rng(0)
    found = []
    for number, length in enumerate(lengths):
        ids = generator.integers(3, 256, length, dtype=np.int32)
        labels = np.where(np.arange(length) >= length // 2, ids, -100).astype(np.int32)
        found.append(Example(input_ids=ids, labels=labels, group=str(number)))
    return found


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
@settings(deadline=None, max_examples=50)
def test_every_token_has_a_place_of_its_own_in_its_document(lengths: list[int]) -> None:
    found = locate(lengths)
    places = found.places.numpy()
    assert len(set(places)) == len(places) == sum(lengths)
    borders = np.cumsum([0] + [length for number, length in found.groups for _ in range(number)])
    for start, stop in zip(found.starts[:-1], found.starts[1:], strict=True):
        own = places[start:stop]
        row = np.searchsorted(borders, own[0], side="right") - 1
        assert own.tolist() == list(range(borders[row], borders[row] + len(own)))
        width = borders[row + 1] - borders[row]
        assert len(own) <= width
        assert width % MULTIPLE == 0
        assert len(own) >= LEAST_FILL * width or width < MULTIPLE + len(own)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"checkpointing": "full"}])
def test_joined_rows_give_the_loss_and_gradients_of_padded_ones(name: str, changes: dict[str, Any]) -> None:
    """Among them documents of more than one block of the attention's backward."""
    rows = [[example] for example in examples(5, 150, 12, 40, 33, 7)]
    setup = tiny_setup(model=MODELS[name], seq_len=160, method="full", max_grad_norm=None)
    found = {}
    for padding_free in (False, True):
        own = setup.with_(padding_free=padding_free, loss="chunked" if padding_free else "full")
        own = own.with_(**(changes if padding_free else {}))
        model = build_model(own)
        batch = micro_batch(own, [[row[0] for row in rows]] if own.packing else rows, pad_id=0)
        step = TrainStep(own, model, build_optimizer(own, model))
        loss = step.micro_step(batch, 100)
        found[padding_free] = [loss, *(p.grad for p in model.parameters())]
    for padded, joined in zip(found[False], found[True], strict=True):
        assert torch.allclose(padded, joined, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_joined_rows_give_the_logits_of_the_rows_alone(name: str) -> None:
    setup = tiny_setup(model=MODELS[name], padding_free=True)
    model = build_model(setup).eval()
    rows = [[example] for example in examples(5, 30, 12)]
    batch = micro_batch(setup, rows, pad_id=0)
    del batch["labels"]
    with torch.no_grad():
        joined = model(**batch, use_cache=False).logits[0]
        alone = [
            model(input_ids=torch.tensor(row[0].input_ids[None]).long(), use_cache=False).logits[0]
            for row in rows
        ]
    assert (joined - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("changes", [{"padding_free": True}, {"kernels": "fused"}])
def test_a_model_that_trains_on_joined_rows_answers_as_it_would_without(changes: dict[str, Any]) -> None:
    """Token by token, with those before in a cache."""
    ids = torch.arange(5, 25).view(1, -1)
    answers = []
    for own in ({}, changes):
        model = build_model(tiny_setup(method="full", **own)).eval()
        for layer in model.model.layers:
            # random weights make attention too small to be seen
            layer.self_attn.v_proj.weight.data *= 50
        found = model.generate(
            ids,
            max_new_tokens=8,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        answers.append(torch.cat(found.logits))
    assert torch.allclose(*answers, atol=1e-4)


def test_a_model_that_lets_documents_see_each_other_is_refused() -> None:
    model = build_model(tiny_setup(padding_free=True, method="full"))
    check_isolation(model)
    forward = model.model.forward
    model.model.forward = lambda *args, documents=None, **options: forward(*args, **options)
    with pytest.raises(SetupError, match="see each other"):
        check_isolation(model)


def test_models_with_other_layers_are_refused() -> None:
    config = {**CONFIG, "layer_types": ["full_attention", "chunked_attention"]}
    with pytest.raises(SetupError, match="chunked_attention"):
        build_model(tiny_setup(model=config, padding_free=True))
    with pytest.raises(SetupError, match="window of 256"):
        build_model(tiny_setup(model=MISTRAL, padding_free=True, seq_len=512))


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((64, 64), torch.bfloat16, True),
        ((256, 256), torch.float16, True),
        ((64, 64), torch.float32, False),
        ((64, 32), torch.bfloat16, False),
        ((20, 20), torch.bfloat16, False),
        ((208, 208), torch.bfloat16, False),
        ((512, 512), torch.bfloat16, False),
    ],
)
def test_heads_that_flash_takes_for_all_documents_at_once(
    shape: tuple[int, int], dtype: Any, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, value = (torch.zeros(1, 2, 3, width, dtype=dtype) for width in shape)
    assert not attention.fits_flash(query, value)
    monkeypatch.setattr(attention, "has_flash", lambda device: True)
    assert attention.fits_flash(query, value) == fits


def test_flash_is_given_the_documents_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of the same arguments that takes document after document, the model's loss and gradients stay."""

    def one_by_one(
        query: Any,
        key: Any,
        value: Any,
        starts: Any,
        key_starts: Any,
        longest: int,
        *rest: Any,
        **options: Any,
    ) -> Any:
        assert starts is key_starts
        assert options.pop("window_size") == (-1, 0)
        assert options.pop("enable_gqa", True)
        lengths = starts.diff().tolist()
        assert max(lengths) == longest == rest[0]
        parts = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
        answers = [
            functional.scaled_dot_product_attention(
                *(t.transpose(0, 1) for t in part), is_causal=True, enable_gqa=True, **options
            )
            for part in parts
        ]
        return torch.cat([answer.transpose(0, 1) for answer in answers])

    setup = tiny_setup(padding_free=True, weights_dtype="bfloat16", adapter_dtype="bfloat16")
    found = []
    for has_flash in (False, True):
        monkeypatch.setattr(attention, "has_flash", lambda device, has_flash=has_flash: has_flash)
        monkeypatch.setattr(attention.varlen, "varlen_attn", one_by_one)
        found.append(loss_and_gradients(setup))
    for gathered, flash in zip(*found, strict=True):
        assert torch.allclose(gathered, flash, rtol=0.05, atol=0.02)


def loss_and_gradients(setup: TrainSetup) -> list[Any]:
    model = build_model(setup)
    step = TrainStep(setup, model, build_optimizer(setup, model))
    rows = [[example] for example in examples(5, 30, 12)]
    loss = step.micro_step(micro_batch(setup, rows, pad_id=0), 23)
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_joined_rows_under_autocast() -> None:
    """Rotary embeddings leave float32 queries and keys beside narrow values."""
    narrow = loss_and_gradients(tiny_setup(padding_free=True, autocast="bfloat16"))
    for found, exact in zip(narrow, loss_and_gradients(tiny_setup(padding_free=True)), strict=True):
        assert torch.allclose(found, exact, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("changes", [{"padding_free": True}, {"kernels": "fused"}])
def test_a_model_without_sdpa_has_no_joined_rows(changes: dict[str, Any]) -> None:
    """gpt-oss' sinks are in its eager softmax alone."""
    config = {**CONFIG, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "head_dim": 16}
    with pytest.raises(SetupError, match="no sdpa"):
        build_model(tiny_setup(model={**config, "num_local_experts": 2}, method="full", **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "full", "checkpointing": "none"},
        {"attention": "flash"},
        {"autocast": "bfloat16", "weights_dtype": "float32"},
        {"weights_dtype": "float32", "checkpointing": "none"},
    ],
)
def test_the_closed_form_of_joined_rows_is_the_trace(changes: dict[str, Any]) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "vocab_size": 4000}
    model = {**CONFIG, **sizes}
    setup = TrainSetup(model=model, micro_batch_size=4, seq_len=256, padding_free=True, **changes)
    closed_form = MemoryModel(setup, resolve(setup))
    workspace = closed_form.run.static()["workspace"]
    found, traced = closed_form.at(4, 256).phases, trace(setup).phases
    for phase in ("forward", "loss", "backward", "optimizer", "eval"):
        assert found[phase] - workspace == pytest.approx(traced[phase].num_bytes, rel=3e-3), phase


@pytest.mark.parametrize("method", ["full", "lora"])
def test_rows_without_a_label_are_left_out_of_the_chunked_loss(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal loss and gradients, and no more logits than trained tokens."""
    monkeypatch.setattr("bench.loss.LOSS_CHUNK_TOKENS", 8)
    setup = tiny_setup(method=method, loss="chunked")
    batch = micro_batch(setup, [[example] for example in examples(30, 18, 9)], pad_id=0)
    num_trained = int((batch["labels"] != -100).sum())
    assert len(batch["trained_rows"]) == num_trained
    found = []
    for keys in (batch, {key: value for key, value in batch.items() if key != "trained_rows"}):
        model = build_model(setup)
        step = TrainStep(setup, model, build_optimizer(setup, model))
        loss = step.micro_step(keys, num_trained)
        found.append([loss, *(p.grad for p in step.parameters)])
    for some, every in zip(*found, strict=True):
        assert torch.allclose(some, every, rtol=1e-4, atol=1e-7)
