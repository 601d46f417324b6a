"""Every method on small real models: what it trains, what its adapter is, and that a run leaves it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.build import build_model, drawn_parameters, trained_parameters
from bench.train import train
from planner.errors import SetupError
from planner.estimate import resolve
from planner.inventory import take_inventory
from planner.methods import find_method, methods
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
