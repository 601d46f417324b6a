"""What is there whatever the batch is: by hand, against bitsandbytes' tensors, against models that PEFT wraps."""

import pytest

from family_configs import BASE
from planner.errors import SetupError
from planner.estimate import resolve
from planner.hf_config import model_spec
from planner.inventory import quantised_bytes, take_inventory, trained_tensors, unquantised_width
from planner.setup import TrainSetup

LLAMA = {**BASE, "model_type": "llama", "tie_word_embeddings": False}
MODELS = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "head_dim": {**LLAMA, "head_dim": 48},
    "qwen2": {**BASE, "model_type": "qwen2"},
    "qwen3": {**BASE, "model_type": "qwen3", "head_dim": 24},
    "gemma3": {**BASE, "model_type": "gemma3_text", "head_dim": 24, "layer_types": ["full_attention"] * 8},
    "phi3": {**BASE, "model_type": "phi3"},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 50,
        "vocab_size": 99,
    },
    "neox": {**BASE, "model_type": "gpt_neox"},
    "mixtral": {**BASE, "model_type": "mixtral", "num_local_experts": 4, "num_hidden_layers": 2},
    "qwen3_moe": {
        **BASE,
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "head_dim": 16,
        "num_hidden_layers": 2,
    },
}


def inventory(config=LLAMA, **fields):
    setup = TrainSetup(model=config, **fields)
    return take_inventory(setup, resolve(setup))


def test_pure_bfloat16_is_eight_bytes_for_each_parameter():
    params = model_spec(LLAMA).num_params
    found = inventory(method="full")
    assert found.weights_bytes == found.gradients_bytes == 2 * params
    assert found.states_bytes == 4 * params
    assert found.adapters_bytes == found.master_bytes == found.host_states_bytes == 0
    assert found.step_bytes == 2 * params, "foreach AdamW's square roots"


@pytest.mark.parametrize(
    ("fields", "per_param"),
    [
        ({"weights_dtype": "float32"}, 16),
        ({"weights_dtype": "float32", "autocast": "bfloat16"}, 16),
        ({"master_weights": "float32"}, 2 + 2 + 4 + 8),
        ({"optimizer": "sgd"}, 4),
        ({"optimizer": "lion"}, 2 + 2 + 4),
    ],
    ids=str,
)
def test_recipes_per_parameter(fields, per_param):
    params = model_spec(LLAMA).num_params
    found = inventory(method="full", **fields)
    total = found.weights_bytes + found.gradients_bytes + found.states_bytes + found.master_bytes
    assert total == per_param * params


def test_adapters_are_rank_times_in_plus_out():
    found = inventory(method="lora", targets=["q_proj", "v_proj"], rank=6)
    elements = 8 * 6 * ((64 + 64) + (64 + 32))
    assert found.trained_params == elements
    assert found.adapters_bytes == found.gradients_bytes == 4 * elements
    assert found.states_bytes == 8 * elements
    assert found.weights_bytes == 2 * model_spec(LLAMA).num_params
    narrow = inventory(method="lora", targets=["q_proj", "v_proj"], rank=6, adapter_dtype="bfloat16")
    assert narrow.adapters_bytes == 2 * elements


def test_paged_states_are_in_host_memory():
    large = {**LLAMA, "vocab_size": 4096, "intermediate_size": 2000}
    found = inventory(large, method="full", optimizer="paged-adamw-8bit")
    on_device = inventory(large, method="full", optimizer="adamw-8bit")
    assert found.host_states_bytes > 0
    assert found.host_states_bytes + found.states_bytes == on_device.states_bytes


def test_the_optimizer_in_the_backward_steps_on_one_tensor():
    found = inventory(method="full", optimizer_in_backward=True)
    assert found.step_bytes == found.largest_trained_bytes == 2 * 320 * 64


def test_a_tied_head_counts_once():
    tied, own = inventory(MODELS["tied"], method="full"), inventory(method="full")
    assert own.weights_bytes - tied.weights_bytes == 2 * 320 * 64
    assert own.trained_params - tied.trained_params == 320 * 64


def test_the_largest_layer_and_the_rest_are_the_model():
    found = inventory(method="full")
    assert 8 * found.largest_layer_bytes + found.root_bytes == found.weights_bytes


def test_unquantised_weights_under_kbit_upcast_are_float32():
    assert unquantised_width(TrainSetup(method="qlora")) == 2
    assert unquantised_width(TrainSetup(method="qlora", kbit_upcast=True)) == 4
    plain, upcast = (inventory(method="qlora", kbit_upcast=up).weights_bytes for up in (False, True))
    kept = 2 * 320 * 64 + 64 * (2 * 8 + 1)
    assert upcast - plain == 2 * kept


def test_targets_that_match_nothing_are_an_error():
    with pytest.raises(SetupError, match="q_porj"):
        inventory(targets=["q_porj"])


def test_quantised_bytes_by_hand():
    weights = 128 * 1024
    assert quantised_bytes(weights, 128, "nf4") == weights // 2 + 4 * weights // 64 + 64
    assert quantised_bytes(weights, 128, "fp4") == quantised_bytes(weights, 128, "nf4")
    nested = weights // 2 + weights // 64 + 4 * weights // 64 // 256 + 64 + 4 + 1024
    assert quantised_bytes(weights, 128, "nf4-double") == nested
    assert quantised_bytes(weights, 128, "int8") == weights + 4 * 128


@pytest.mark.train
@pytest.mark.parametrize("shape", [(64, 64), (128, 1024), (32, 96), (24, 40), (4096, 33), (7, 9)], ids=str)
@pytest.mark.parametrize("quant", ["nf4", "nf4-double", "fp4"])
def test_4bit_bytes_are_those_of_bitsandbytes(quant, shape):
    import bitsandbytes as bnb
    import torch

    kind = quant.removesuffix("-double")
    weight = torch.randn(shape, dtype=torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=quant.endswith("double")
    )
    tensors = [packed, state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    found = sum(t.nbytes for t in tensors)
    assert quantised_bytes(weight.numel(), shape[0], quant) == found


@pytest.mark.train
@pytest.mark.parametrize("shape", [(64, 64), (24, 40), (7, 9)], ids=str)
def test_8bit_bytes_are_those_of_bitsandbytes(shape):
    import bitsandbytes as bnb
    import torch

    rows, statistics, _ = bnb.functional.int8_vectorwise_quant(torch.randn(shape, dtype=torch.float16))
    assert quantised_bytes(rows.numel(), shape[0], "int8") == rows.nbytes + statistics.nbytes


@pytest.mark.train
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_trains_and_what_is_kept_is_what_peft_and_transformers_build(name, method):
    from bench.build import build_model

    setup = TrainSetup(model=MODELS[name], method=method, rank=6, from_scratch=True)
    model = build_model(setup, meta=True)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    found = take_inventory(setup, resolve(setup))
    assert found.trained_params == sum(p.numel() for p in trained)
    assert found.gradients_bytes == sum(p.nbytes for p in trained)
    adapters = sum(p.nbytes for p in trained) if method == "lora" else 0
    assert found.adapters_bytes == adapters
    assert found.weights_bytes == sum(p.nbytes for p in parameters) - adapters
    assert found.largest_trained_bytes == max(p.nbytes for p in trained)


@pytest.mark.train
@pytest.mark.parametrize("quant", ["nf4-double", "nf4", "int8"])
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("name", ["llama", "tied", "biases", "gpt2", "neox", "mixtral"])
def test_quantised_models_weigh_what_the_real_ones_do(name, upcast, quant):
    """Packed tensors stand for the linears that transformers really replaces; everything else is as wide as it is loaded."""
    from bench.build import build_model

    setup = TrainSetup(
        model=MODELS[name], method="qlora", quant=quant, kbit_upcast=upcast, rank=6, from_scratch=True
    )
    model = build_model(setup, meta=True)
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        is_packed = type(parameter).__name__ in ("Params4bit", "Int8Params")
        if is_packed:
            total += quantised_bytes(parameter.numel(), parameter.shape[0], quant)
        else:
            total += parameter.numel() * unquantised_width(setup)
    assert take_inventory(setup, resolve(setup)).weights_bytes == total


def test_every_trained_tensor_is_listed_once():
    setup = TrainSetup(model=MODELS["qwen3_moe"], method="full")
    spec = resolve(setup)
    tensors = list(trained_tensors(setup, spec))
    assert sum(t.count * t.num_elements for t in tensors) == spec.num_params
    stacks = [t for t in tensors if t.stack > 1]
    assert {t.stack for t in stacks} == {6}
    assert all(t.factors == (6 * t.rows, 6 * t.columns) for t in stacks)
