"""Every method on small real models: what it trains, what its adapter is, and that a run leaves it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.build import build_model, drawn_parameters, trained_parameters
from bench.init_adapter import start_from
from bench.train import train
from planner.checks import warnings
from planner.errors import SetupError
from planner.estimate import resolve
from planner.inventory import take_inventory
from planner.methods import find_method, methods
from planner.planfile import read_plan
from planner.setup import TrainSetup
from tiny_llama import CONFIG, save_tiny_model, tiny_setup, write_rows

pytestmark = pytest.mark.train

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": CONFIG,
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256},
    "qwen2": {"model_type": "qwen2", "intermediate_size": 96, "num_key_value_heads": 2, **SMALL},
    "gemma": {
        "model_type": "gemma",
        "intermediate_size": 96,
        "head_dim": 24,
        "num_key_value_heads": 1,
        **SMALL,
    },
    "mixtral": {
        "model_type": "mixtral",
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_key_value_heads": 2,
        **SMALL,
    },
}
ADDING = sorted(name for name, method in methods().items() if not method.trains_base)


def small(config: str, method: str, **changes: Any) -> TrainSetup:
    return tiny_setup(model=CONFIGS[config], method=method, **{"rank": 4, "num_virtual_tokens": 3, **changes})


@pytest.mark.parametrize("method", ADDING)
@pytest.mark.parametrize("config", CONFIGS)
def test_trained_parameters_are_counted_exactly(config: str, method: str) -> None:
    is_named = config == "mixtral" and find_method(method).has_rank and not find_method(method).folds
    targets = ["q_proj", "v_proj"] if is_named else "all-linear"
    setup = small(config, method, targets=targets)
    try:
        counted = take_inventory(setup, resolve(setup)).trained_params
    except SetupError as refused:
        with pytest.raises(SetupError, match=refused.field):
            build_model(setup, meta=True)
        return
    trained = trained_parameters(build_model(setup, meta=True))
    assert counted == sum(parameter.numel() for parameter in trained.values())


def test_experts_that_are_one_parameter_are_refused_with_what_can_be_named() -> None:
    setup = small("mixtral", "dora")
    with pytest.raises(SetupError, match=r"dora can't adapt .* of mixtral.*name modules: q_proj"):
        take_inventory(setup, resolve(setup))


def test_a_model_without_biases_is_told_what_else_there_is() -> None:
    setup = small("llama", "bitfit")
    with pytest.raises(SetupError, match=r"bitfit takes biases .*use ia3.* llama has none"):
        take_inventory(setup, resolve(setup))


def test_a_factor_that_was_drawn_is_kept_though_it_does_not_train() -> None:
    setup = small("llama", "lora-fa")
    model = build_model(setup, meta=True)
    kept, trained = drawn_parameters(setup, model), trained_parameters(model)
    assert set(trained) == {name for name in kept if ".lora_B." in name}
    assert any(".lora_A." in name for name in kept)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ia3", {"dropout": 0.1}),
        ("bitfit", {"dropout": 0.1}),
        ("prompt", {"packing": True}),
        ("prefix", {"checkpointing": "full"}),
        ("prefix", {"attention": "eager"}),
    ],
)
def test_what_a_method_can_not_run_is_refused_by_name(method: str, changes: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match=f"{next(iter(changes))}: {method}"):
        build_model(small("qwen2", method, **changes), meta=True)


def test_keys_and_values_of_other_shapes_take_no_prefix() -> None:
    setup = TrainSetup(model="deepseek-v2-lite", method="prefix", checkpointing="none")
    with pytest.raises(SetupError, match="one shape for all keys and values"):
        take_inventory(setup, resolve(setup))


def test_a_rank_beyond_what_the_rate_was_found_with_is_warned_of() -> None:
    large = tiny_setup(rank=256, learning_rate=None)
    spec = resolve(large)
    (warning,) = (line for line in warnings(large, spec) if "rank 256" in line)
    assert "rslora" in warning
    for calm in (large.with_(rank=64), large.with_(method="rslora"), large.with_(learning_rate=1e-4)):
        assert not any("rank" in line for line in warnings(calm, spec))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("methods")
    save_tiny_model(made / "model", attention_bias=True)
    write_rows(made / "rows.jsonl", 12)
    return made


def run(folder: Path, out: Path, method: str, **changes: Any) -> Any:
    plan = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl"), "from_scratch": False}
    fixed = {"seq_len": 64, "rank": 4, "max_steps": 2, "eval_fraction": 0.0, "method": method}
    fixed["num_virtual_tokens"] = 4
    return train(tiny_setup(**{**plan, **fixed, **changes}), out, progress=False)


QUICK = ("dora",)
NEW = [
    pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow)
    for m in ADDING
    if m not in ("lora", "qlora")
]


@pytest.mark.parametrize("method", NEW)
def test_a_run_leaves_an_adapter_that_peft_reads(folder: Path, tmp_path: Path, method: str) -> None:
    """The run itself compares logits: those of the reloaded adapter are the model's and not the base's."""
    summary = run(folder, tmp_path / "run", method)
    assert summary.artifact == "adapter"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def earlier(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a run's, with an adapter that has learned something."""
    out = tmp_path_factory.mktemp("earlier")
    model: Any = build_model(tiny_setup(model=str(folder / "model"), rank=4), weights=folder / "model")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_()
    model.peft_config["default"].base_model_name_or_path = str(folder / "model")
    model.save_pretrained(out / "adapter", save_embedding_layers=False)
    return out


@pytest.mark.slow
def test_a_run_goes_on_from_an_earlier_adapter(folder: Path, earlier: Path, tmp_path: Path) -> None:
    """One short step further, it is still that adapter; the plan in its folder says where it came from."""
    own = {"init_adapter": str(earlier), "max_steps": 1, "learning_rate": 1e-6}
    run(folder, tmp_path / "run", "lora", **own)
    saved, new = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (earlier, tmp_path / "run"))
    assert all(torch.allclose(saved[name], new[name], atol=1e-5) for name in saved)
    assert read_plan(tmp_path / "run" / "plan.yaml").setup.init_adapter == str(earlier)


def test_an_earlier_adapter_is_read_as_it_was(folder: Path, earlier: Path) -> None:
    setup = tiny_setup(model=str(folder / "model"), rank=4, init_adapter=str(earlier))
    model = build_model(setup, weights=folder / "model")
    start_from(setup, model)
    saved = load_file(earlier / "adapter" / "adapter_model.safetensors")
    own = {name.replace(".default", ""): tensor for name, tensor in trained_parameters(model).items()}
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in saved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 8}, "rank 4 there, 8 here"),
        ({"method": "dora"}, "DoRA none there, True here"),
        ({"targets": ["q_proj", "v_proj"]}, "targets .* there, q_proj, v_proj here"),
    ],
)
def test_an_adapter_of_another_plan_is_refused_with_the_difference(
    folder: Path, earlier: Path, changes: dict[str, Any], said: str
) -> None:
    own = {
        "model": str(folder / "model"),
        "method": "lora",
        "rank": 4,
        "init_adapter": str(earlier),
        **changes,
    }
    setup = tiny_setup(**own)
    model = build_model(setup)
    with pytest.raises(SetupError, match=rf"init_adapter: .* isn't of this plan: .*{said}") as caught:
        start_from(setup, model)
    assert "\n" not in str(caught.value)


def test_a_base_of_another_name_or_no_adapter_is_refused(folder: Path, earlier: Path, tmp_path: Path) -> None:
    setup = tiny_setup(model="org/other", method="lora", rank=4, init_adapter=str(earlier))
    model = build_model(setup.with_(model=CONFIG))
    with pytest.raises(SetupError, match=r"base model .*model there, org/other here"):
        start_from(setup, model)
    with pytest.raises(SetupError, match="holds no adapter"):
        start_from(setup.with_(init_adapter=str(tmp_path)), model)
    with pytest.raises(SetupError, match="no adapter to go on from"):
        setup.with_(method="full")
