"""`kernels: fused`: the same numbers as the modules' own, and modules that it doesn't know left alone."""

from __future__ import annotations

from typing import Any

import pytest

from planner.errors import SetupError
from planner.estimate import resolve
from planner.memory import MemoryModel
from planner.setup import TrainSetup
from tiny_llama import CONFIG, count_trained, random_batch, tiny_setup

torch = pytest.importorskip("torch")

from bench.build import build_model, check_runnable  # noqa: E402
from bench.fused import AdaptedLinears, GatedSilu, RootMeanSquareNorm, rotate  # noqa: E402
from bench.optim import build_optimizer  # noqa: E402
from bench.step import TrainStep  # noqa: E402
from bench.trace.run import trace  # noqa: E402

pytestmark = pytest.mark.train

MODELS: dict[str, dict[str, Any]] = {
    "llama": CONFIG,
    "biased": {**CONFIG, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qk-norm": {**CONFIG, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 24},
    "part-turned": {
        **CONFIG,
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "rotary_pct": 0.25,
    },
    "other-norm": {
        **CONFIG,
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 16,
        "sliding_window": 64,
    },
}


@pytest.fixture(autouse=True)
def own_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put into transformers' files is taken out again."""
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gpt_neox import modeling_gpt_neox
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3

    for module in (modeling_llama, modeling_qwen2, modeling_qwen3, modeling_gemma2, modeling_gpt_neox):
        monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)


def one_step(**changes: Any) -> dict[str, Any]:
    """Loss and gradients of one micro-batch, with adapters whose B isn't zero."""
    setup = tiny_setup(**changes)
    model = build_model(setup)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    step = TrainStep(setup, model, build_optimizer(setup, model))
    batch = random_batch()
    if setup.packing:
        batch["position_ids"] = torch.arange(16).repeat(2, 2)
    loss = step.micro_step(batch, count_trained(batch))
    return {"loss": loss, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("changes", [{"method": "lora"}, {"method": "full"}, {"checkpointing": "full"}])
def test_fused_kernels_give_the_same_loss_and_gradients(name: str, changes: dict[str, Any]) -> None:
    changes = {"model": MODELS[name], **changes}
    if name == "other-norm":
        changes["attention"] = "eager"
    elif "checkpointing" in changes:
        changes["packing"] = True
    plain, fused = one_step(**changes), one_step(**changes, kernels="fused")
    assert plain.keys() == fused.keys()
    for key, expected in plain.items():
        assert torch.allclose(fused[key], expected, rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float32"])
def test_in_16_bits_they_differ_no_more_than_rounding_does(adapter_dtype: str) -> None:
    """From float32's gradients fused kernels are no farther than twice what the plain ones are."""
    narrow = {"weights_dtype": "bfloat16", "adapter_dtype": adapter_dtype}
    exact, plain, fused = one_step(), one_step(**narrow), one_step(**narrow, kernels="fused")
    for key, expected in exact.items():
        errors = [float((found[key].float() - expected).norm()) for found in (plain, fused)]
        assert errors[1] <= 2 * errors[0] + 1e-3 * float(expected.norm()), key


def test_modules_are_replaced_where_they_are_known_only() -> None:
    def replaced(**changes: Any) -> set[str]:
        model = build_model(tiny_setup(kernels="fused", **changes))
        return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}

    assert replaced() == {"Linear", "LlamaMLP", "LlamaRMSNorm"}
    assert "Linear" not in replaced(dropout=0.1), "a dropout between x and A"
    assert "Linear" in replaced(weights_dtype="bfloat16"), "float32 adapters on bfloat16 weights"
    gemma = replaced(model=MODELS["other-norm"], attention="eager")
    assert not gemma & {"Gemma2RMSNorm", "Gemma2MLP"}, (
        "its norm adds one to the weight, its activation is GELU"
    )


def test_a_frozen_first_factor_needs_no_input() -> None:
    model = build_model(tiny_setup(kernels="fused", method="lora-fa"))
    (name, first), *_ = [(n, p) for n, p in model.named_parameters() if "lora_B" in n]
    first.data += 0.1
    batch = random_batch()
    model(input_ids=batch["input_ids"]).logits.sum().backward()
    plain = build_model(tiny_setup(method="lora-fa"))
    plain.load_state_dict(model.state_dict())
    plain(input_ids=batch["input_ids"]).logits.sum().backward()
    expected = dict(plain.named_parameters())[name].grad
    assert torch.allclose(first.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"checkpointing": "none", "adapter_dtype": "bfloat16"},
        {"method": "full", "checkpointing": "none"},
        {"method": "qlora"},
        {"checkpointing": "none", "packing": True, "padding_free": True},
        {"checkpointing": "none", "weights_dtype": "float32"},
    ],
)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_closed_form_of_fused_kernels_is_the_trace(on_gpu: bool, changes: dict[str, Any]) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "vocab_size": 4000}
    model = {**CONFIG, **sizes}
    setup = TrainSetup(model=model, micro_batch_size=4, seq_len=256, kernels="fused", **changes)
    closed_form = MemoryModel(setup, resolve(setup), on_gpu=on_gpu)
    workspace = closed_form.run.static()["workspace"]
    found, traced = closed_form.at(4, 256).phases, trace(setup, on_gpu=on_gpu).phases
    for phase in ("forward", "loss", "backward", "optimizer", "eval"):
        assert found[phase] - workspace == pytest.approx(traced[phase].num_bytes, rel=5e-3), phase


def test_adapters_that_are_switched_off_give_the_base_model() -> None:
    model = build_model(tiny_setup(kernels="fused"))
    ids = random_batch()["input_ids"]
    base = build_model(tiny_setup(method="full"))
    with torch.no_grad(), model.disable_adapter():
        assert torch.allclose(model(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-5)


def test_gradients_by_finite_differences() -> None:
    def leaf(*shape: int) -> Any:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    x, frozen = leaf(2, 3, 6), torch.randn(5, 6, dtype=torch.float64)
    parts = (
        frozen,
        None,
        leaf(2, 6),
        leaf(5, 2),
        0.5,
        frozen[:4],
        frozen[0, :4],
        leaf(3, 6),
        leaf(4, 3),
        2.0,
    )
    assert torch.autograd.gradcheck(AdaptedLinears.apply, (x, *parts))
    assert torch.autograd.gradcheck(GatedSilu.apply, (leaf(3, 4), leaf(3, 4)))
    heads = leaf(1, 2, 3, 4)
    angles = torch.rand(1, 3, 2, dtype=torch.float64).repeat(1, 1, 2)
    assert torch.autograd.gradcheck(lambda q: rotate(q, q, angles.cos(), angles.sin()), (heads,))
    x32 = torch.randn(4, 8, requires_grad=True)
    weight = torch.rand(8, requires_grad=True)
    found = torch.autograd.grad(RootMeanSquareNorm.apply(x32, weight, 1e-6).pow(2).sum(), (x32, weight))
    plain = (weight * torch.nn.functional.rms_norm(x32, (8,), eps=1e-6)).pow(2).sum()
    for own, expected in zip(found, torch.autograd.grad(plain, (x32, weight)), strict=True):
        assert torch.allclose(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"compile": True}, {"autocast": "bfloat16"}])
def test_what_fused_kernels_do_not_run_with(changes: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match="fused runs without"):
        check_runnable(tiny_setup(kernels="fused", **changes), "cpu")
