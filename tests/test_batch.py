"""Many setups at once: the same answers as one by one, whatever is remembered between them."""

import importlib
import pkgutil
from types import ModuleType

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import planner
from family_configs import CONFIGS
from planner import api
from planner.catalog import find_gpu
from planner.errors import SetupError
from planner.estimate import estimate_many, memory_many, resolve
from planner.memory import estimate_memory, memory_model
from planner.setup import TrainSetup
from planner.specs import Machine

GPU = "a100-80gb-sxm4"
MACHINE = Machine(gpu=find_gpu(GPU))
KINDS = ("gemma2", "gemma3_text", "mixtral", "gpt2", "granite", "phi3", "cohere")
MODELS = [config for config in CONFIGS if config["model_type"] in KINDS]

recipes = st.sampled_from(
    [
        {"method": "lora"},
        {"method": "lora", "adapter_dtype": "bfloat16", "dropout": 0.1},
        {"method": "qlora"},
        {"method": "qlora", "quant": "int8"},
        {"method": "qlora", "autocast": "bfloat16", "kbit_upcast": True},
        {"method": "full"},
        {"method": "full", "weights_dtype": "float32", "autocast": "bfloat16"},
        {"method": "full", "master_weights": "float32"},
        {"method": "full", "optimizer_in_backward": True},
    ]
)
shapes = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["smollm2-135m", "qwen3-0.6b", *MODELS]),
        "rank": st.sampled_from([4, 16]),
        "optimizer": st.sampled_from(["adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor"]),
        "micro_batch_size": st.integers(1, 8),
        "eval_batch_size": st.sampled_from([None, 3]),
        "seq_len": st.sampled_from([16, 512, 5000]),
        "checkpointing": st.sampled_from(["none", "full"]),
        "loss": st.sampled_from(["full", "chunked"]),
        "attention": st.sampled_from(["sdpa", "flash", "eager"]),
        "stack": st.sampled_from([None, "transformers 4.46.0"]),
    }
)
setups = st.builds(lambda recipe, shape: TrainSetup(**recipe, **shape), recipes, shapes)


def modules() -> list[ModuleType]:
    return [importlib.import_module(f"planner.{m.name}") for m in pkgutil.iter_modules(planner.__path__)]


def forget() -> None:
    for module in modules():
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def alone(setup):
    forget()
    return estimate_memory(setup, resolve(setup), capability=MACHINE.gpu.compute_capability)


@given(st.lists(setups, min_size=2, max_size=6))
@settings(max_examples=25, deadline=None)
def test_a_batch_says_what_each_setup_alone_says(batch):
    again = [*batch, *reversed(batch)]
    assert list(memory_many(again, MACHINE)) == [alone(setup) for setup in again]


@pytest.mark.train
@given(setups, st.sampled_from(["none", "ddp", "zero3", "fsdp1", "fsdp"]))
@settings(max_examples=25, deadline=None)
def test_many_shapes_in_arrays_are_what_each_is_alone(setup, sharding):
    assume(not (setup.quant and sharding == "zero3"))  # a setup that is refused
    changed = {"sharding": sharding, "num_gpus": 1 if sharding == "none" else 4}
    if not setup.optimizer_in_backward:
        setup = setup.with_(**changed, grad_accum_steps=2)
    owner = memory_model(setup, resolve(setup))
    asked = [(rows, length) for rows in (1, 2, 3, 8) for length in (16, 512, 777, 4096, 5000, 9000)]
    assert owner.at_many([*asked, *asked]) == [owner.at(*shape) for shape in [*asked, *asked]]


def test_setups_that_differ_in_their_batch_only_share_all_the_rest():
    base = TrainSetup(model="smollm2-135m", eval_batch_size=4)
    batch = [base.with_(micro_batch_size=size, seq_len=length) for size in (1, 3) for length in (64, 8192)]
    assert list(memory_many(batch, MACHINE)) == [alone(setup) for setup in batch]


def test_estimates_of_a_batch_are_those_of_the_api_one_by_one():
    batch = [TrainSetup(model="smollm2-135m", rank=rank, seq_len=n) for rank in (8, 16) for n in (512, 1024)]
    single = [api.estimate("smollm2-135m", gpu=GPU, rank=s.rank, seq_len=s.seq_len) for s in batch]
    assert list(api.estimate_many(batch, gpu=GPU)) == single
    assert list(api.memory_many(batch, gpu=GPU)) == [found.memory for found in single]


def test_what_is_remembered_is_bounded():
    for module in modules():
        for name, value in vars(module).items():
            takes_setups_or_models = hasattr(value, "cache_parameters") and {
                "model",
                "recipe",
                "layer",
            } & set(value.__wrapped__.__annotations__)
            assert not takes_setups_or_models or value.cache_parameters()["maxsize"], name


def test_an_impossible_setup_is_an_error_at_its_place():
    good = TrainSetup(model="smollm2-135m")
    answers = estimate_many([good, good.with_(targets=("nowhere",))], MACHINE)
    assert next(answers).setup == good
    with pytest.raises(SetupError, match="nowhere"):
        next(answers)
