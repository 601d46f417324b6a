"""One TrainSetup gives the model, the optimizer and the schedule that it names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.build import build_model, check_runnable, quantise, trained_parameters
from bench.loss import check_head
from bench.optim import BackwardOptimizer, MasterWeights, Schedule, build_optimizer, build_schedule
from planner.errors import ConfigError, FinefitError, NotModelledError, SetupError
from tiny_llama import CONFIG, save_tiny_model, tiny_setup

pytestmark = pytest.mark.train


def shapes(model: torch.nn.Module) -> dict[str, Any]:
    return {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_meta_model_has_the_real_one_s_parameters(method: str, dtype: str) -> None:
    setup = tiny_setup(method=method, weights_dtype=dtype, adapter_dtype="bfloat16", checkpointing="full")
    meta = build_model(setup, meta=True)
    assert all(p.is_meta for p in meta.parameters())
    assert shapes(meta) == shapes(build_model(setup))


def test_meta_qlora_trains_what_the_real_one_trains() -> None:
    setup = tiny_setup(method="qlora", weights_dtype="bfloat16")
    meta, real = build_model(setup, meta=True), build_model(setup)
    assert {n: p.shape for n, p in trained_parameters(meta).items()} == {
        n: p.shape for n, p in trained_parameters(real).items()
    }


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_alone_train_in_their_dtype(method: str, adapter_dtype: str) -> None:
    setup = tiny_setup(method=method, weights_dtype="bfloat16", adapter_dtype=adapter_dtype, rank=4)
    trained = trained_parameters(build_model(setup))
    assert trained
    assert all(".lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {getattr(torch, adapter_dtype)}


def test_num_adapter_elements_is_what_the_method_says() -> None:
    """2 layers x rank x (in + out) over q, k, v, o, gate, up, down."""
    trained = trained_parameters(build_model(tiny_setup(method="lora", rank=4)))
    per_layer = 4 * ((64 + 64) + (64 + 32) * 2 + (64 + 64) + (64 + 128) * 2 + (128 + 64))
    assert sum(p.numel() for p in trained.values()) == 2 * per_layer


@pytest.mark.parametrize(
    ("quant", "dtype", "num_bytes"),
    [("nf4", torch.uint8, 64 * 64 // 2), ("fp4", torch.uint8, 64 * 64 // 2), ("int8", torch.int8, 64 * 64)],
)
def test_linears_are_quantised_and_the_head_is_not(quant: str, dtype: torch.dtype, num_bytes: int) -> None:
    model = build_model(tiny_setup(method="qlora", quant=quant, weights_dtype="bfloat16", kbit_upcast=False))
    weights = dict(model.named_parameters())
    packed = weights["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert (packed.dtype, packed.numel()) == (dtype, num_bytes)
    assert weights["base_model.model.model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(("kbit_upcast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_kbit_upcast_casts_what_stays_unquantised(kbit_upcast: bool, dtype: torch.dtype) -> None:
    model = build_model(tiny_setup(method="qlora", weights_dtype="bfloat16", kbit_upcast=kbit_upcast))
    weights = dict(model.named_parameters())
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert weights[f"base_model.model.{name}"].dtype == dtype


@pytest.mark.parametrize("quant", ["nf4-double", "nf4", "fp4", "int8"])
def test_quantising_in_place_equals_loading_quantised(tmp_path: Any, quant: str) -> None:
    """Random weights take our own path; a folder takes transformers' from_pretrained."""
    folder = save_tiny_model(tmp_path / "model")
    setup = tiny_setup(
        method="qlora", quant=quant, weights_dtype="bfloat16", kbit_upcast=False, from_scratch=False
    )
    loaded = build_model(setup, weights=folder)
    plain = build_model(setup.with_(method="full", quant=None), weights=folder)
    own = quantise(setup, plain, torch.device("cpu"))
    theirs = {
        n.replace("base_model.model.", "").replace("base_layer.", ""): p for n, p in loaded.named_parameters()
    }
    for name, parameter in own.named_parameters():
        assert torch.equal(parameter.data, theirs[name].data), name


def test_weights_come_from_the_folder(tmp_path: Any) -> None:
    folder = save_tiny_model(tmp_path / "model")
    setup = tiny_setup(method="full", from_scratch=False)
    first, second = build_model(setup, weights=folder), build_model(setup, weights=folder)
    random = build_model(setup.with_(from_scratch=True), weights=folder)
    a, b, c = (dict(m.named_parameters())["model.embed_tokens.weight"] for m in (first, second, random))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_seed_decides_random_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        return next(build_model(tiny_setup(seed=seed)).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_checkpointing_is_on_every_layer_without_an_input_hook() -> None:
    model = build_model(tiny_setup(method="lora", checkpointing="full"))
    layers = model.get_base_model().model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    hidden = model.get_base_model().get_input_embeddings()(torch.tensor([[5]]))
    assert not hidden.requires_grad


def test_tied_head_stays_tied() -> None:
    model = build_model(tiny_setup(method="full"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(trained_parameters(model)) == len({id(p) for p in model.parameters()})


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"targets": ("no_such_proj",)}, SetupError, "targets"),
        ({"checkpointing": "selective"}, NotModelledError, "selective"),
        ({"model": {"model_type": "llama", "hidden_size": "many"}}, ConfigError, "hidden"),
        ({"model": {"hidden_size": 64}}, FinefitError, "model_type"),
    ],
)
def test_what_cannot_be_built_says_so_in_one_line(changes: dict[str, Any], error: type, word: str) -> None:
    with pytest.raises(error) as caught:
        build_model(tiny_setup(**changes))
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"objective": "mlm"}, "objective"),
        ({"kernels": "liger"}, "kernels"),
        ({"attention": "flash"}, "attention"),
        ({"loss": "fused"}, "loss"),
        ({"method": "full", "weights_dtype": "float16"}, "weights_dtype"),
        ({"adapter_dtype": "float16"}, "adapter_dtype"),
    ],
)
def test_what_cannot_run_here_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(FinefitError, match=word):
        check_runnable(tiny_setup(**changes), "cpu")
    check_runnable(tiny_setup(), "cpu")


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_head_wise_losses_refuse_scaled_logits(family: str) -> None:
    config = {**CONFIG, "model_type": family, "logits_scaling": 4.0, "logit_scale": 0.25}
    config.pop("architectures")
    with pytest.raises(SetupError, match="loss"):
        check_head(build_model(tiny_setup(model=config, method="full")))


def test_optimizer_follows_the_setup() -> None:
    model = build_model(tiny_setup(method="full"))
    plain = build_optimizer(tiny_setup(method="full", weight_decay=0.1), model)
    assert isinstance(plain, torch.optim.AdamW)
    decays = {g["weight_decay"]: {p.ndim for p in g["params"]} for g in plain.param_groups}
    assert decays == {0.1: {2}, 0.0: {1}}
    in_backward = tiny_setup(method="full", optimizer_in_backward=True)
    assert isinstance(build_optimizer(in_backward, build_model(in_backward)), BackwardOptimizer)
    masters = tiny_setup(method="full", weights_dtype="bfloat16", master_weights="float32")
    assert isinstance(build_optimizer(masters, build_model(masters)), MasterWeights)


@given(
    num_steps=st.integers(1, 300),
    warmup=st.integers(0, 100),
    shape=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_schedule_rises_then_falls_and_every_step_trains(num_steps: int, warmup: int, shape: str) -> None:
    schedule = Schedule(peak=1e-3, num_steps=num_steps, warmup_steps=min(warmup, num_steps), shape=shape)
    rates = [schedule(step) for step in range(num_steps)]
    top = schedule.warmup_steps
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if top < num_steps:
        assert math.isclose(rates[top], 1e-3)


def test_defaults_of_rate_and_warmup() -> None:
    schedule = build_schedule(tiny_setup(learning_rate=None, warmup_steps=None, method="lora"), 100)
    assert (schedule.peak, schedule.warmup_steps) == (2e-4, 3)
