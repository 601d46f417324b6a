"""Optimizers' states against the real classes; methods' adapters against PEFT's; both registries."""

import importlib
import json
import re

import pytest

from planner.errors import UnknownNameError
from planner.methods import find_method, methods
from planner.optimizers import (
    BNB_BLOCK_ELEMENTS,
    BNB_MIN_8BIT_ELEMENTS,
    BNB_PAGED_MIN_ELEMENTS,
    OPTIMIZERS,
    find_optimizer,
)
from planner.setup import TrainSetup
from planner.specs import Matrix

SHAPES = ((17, 33), (64, 64), (4, 1024), (400, 300), (4097,), (7,), (3, 5, 9), (2, 300, 400))
"""Below and above bitsandbytes' limits (4096 and 100,000 elements), no multiple of its block, 1 to 3 dimensions."""


def numel(shape):
    total = 1
    for size in shape:
        total *= size
    return total


def factors(shape):
    """Elements of the rows and of the columns of all matrices in a parameter, as the inventory names them."""
    if len(shape) < 2:
        return None
    stack = numel(shape[:-2])
    return stack * shape[-2], stack * shape[-1]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_entry_is_found_by_its_name_and_says_where_it_comes_from(name):
    entry = find_optimizer(name)
    assert entry.name == name
    assert entry.summary
    assert entry.source
    assert json.loads(json.dumps(dict(entry.kwargs))) == dict(entry.kwargs)


def test_an_unknown_optimizer_names_its_neighbours():
    with pytest.raises(UnknownNameError, match="adamw") as caught:
        find_optimizer("adam")
    assert caught.value.exit_code == 2


def test_adamw_keeps_two_states_in_the_parameters_dtype():
    assert find_optimizer("adamw").state_bytes(1000, 2) == 4000
    assert find_optimizer("adamw").state_bytes(1000, 4) == 8000


def test_8bit_states_take_a_byte_and_a_constant_per_block_above_a_minimal_size():
    entry = find_optimizer("adamw-8bit")
    assert entry.state_bytes(BNB_MIN_8BIT_ELEMENTS, 2) == 2 * (4096 + 4 * 16)
    assert entry.state_bytes(BNB_MIN_8BIT_ELEMENTS + 1, 2) == 2 * (4097 + 4 * 17)
    assert entry.state_bytes(BNB_MIN_8BIT_ELEMENTS - 1, 2) == 2 * 4 * 4095


def test_paged_states_are_on_the_host_but_their_constants():
    entry = find_optimizer("paged-adamw-8bit")
    small, large = BNB_PAGED_MIN_ELEMENTS - 1, BNB_PAGED_MIN_ELEMENTS
    assert entry.host_state_bytes(small, 2) == 0
    assert entry.host_state_bytes(large, 2) == 2 * large
    assert find_optimizer("paged-adamw").host_state_bytes(large, 2) == 2 * 4 * large
    assert find_optimizer("adamw-8bit").host_state_bytes(large, 2) == 0
    blocks = -(-large // BNB_BLOCK_ELEMENTS)
    assert entry.state_bytes(large, 2) - entry.host_state_bytes(large, 2) == 2 * 4 * blocks


def test_a_step_one_by_one_casts_16_bit_tensors_besides_its_own_temporaries():
    entry = find_optimizer("adafactor")
    assert entry.tensor_step_bytes(1000, 2) == 16_000
    assert entry.tensor_step_bytes(1000, 4) == 8_000
    assert find_optimizer("adamw").tensor_step_bytes(1000, 2) == 0


@pytest.mark.train
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_states_weigh_what_the_real_optimizer_keeps(name, shape, dtype):
    import torch

    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype)))
    found = real_state_bytes(find_optimizer(name), parameter)
    width = parameter.element_size()
    assert find_optimizer(name).state_bytes(numel(shape), width, factors(shape)) == found


def real_state_bytes(entry, parameter):
    """Bytes of an optimizer's per-element tensors after a step; scalars and shared code books are left out."""
    import torch

    module, _, class_name = entry.factory.rpartition(".")
    factory = getattr(importlib.import_module(module), class_name)
    optimizer = factory([parameter], lr=1e-3, **entry.kwargs)
    parameter.grad = torch.ones_like(parameter)
    if entry.factory.startswith("bitsandbytes"):
        optimizer.get_state_buffer = lambda p, dtype=torch.float32: torch.zeros_like(p, dtype=dtype)
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    else:
        optimizer.step()
    state = {k: v for k, v in optimizer.state[parameter].items() if not k.startswith("qmap")}
    tensors = [v for v in state.values() if isinstance(v, torch.Tensor) and v.ndim]
    return sum(t.nbytes for t in tensors)


def test_methods_are_the_files_of_their_folder():
    assert {"full", "lora", "qlora"} <= set(methods())
    for name, method in methods().items():
        assert method.name == name
        assert find_method(name) is method
        assert re.search(r"\d", method.learning_rate_source), "a source that names its figure"


def test_an_unknown_method_names_its_neighbours():
    with pytest.raises(UnknownNameError, match="qlora"):
        find_method("qlorra")
    for name in ("__init__", "_x", "../full", "", "planner"):
        with pytest.raises(UnknownNameError):
            find_method(name)


def test_only_full_training_trains_the_base_and_only_qlora_packs_it():
    assert {name for name, m in methods().items() if m.trains_base} == {"full"}
    assert {name for name, m in methods().items() if m.quantises_base} == {"qlora"}


def test_full_adds_nothing_and_asks_peft_for_nothing():
    matrix = Matrix(module="q", role="q", in_features=8, out_features=4)
    assert find_method("full").parts(matrix, 16) == ()
    assert find_method("full").peft_config(TrainSetup(method="full"), lambda: None) is None
