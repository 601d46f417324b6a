"""The traced step against arithmetic, against what this CPU's allocator really handed out, and CUDA's rules."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from bench.build import build_model, trained_parameters
from bench.optim import build_optimizer
from bench.step import TrainStep
from bench.trace.cuda import WORKSPACES, cuda_rules, gemm_4bit_workspace
from bench.trace.estimate import trace_estimate
from bench.trace.run import record, trace
from bench.trace.tracker import Tracker
from planner.catalog import find_gpu
from planner.errors import ConfigError, NotModelledError, SetupError
from planner.estimate import estimate
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import MIB

pytestmark = pytest.mark.train

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}
NUM_PARAMS = 2 * 2000 * 128 + 128 + 3 * (2 * 128 + 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 352)
INV_FREQ_BYTES = 2 * 16 * 4
"""The rotary embedding's frequencies and their original, float32, half a head each."""


def setup_of(**changes: Any) -> TrainSetup:
    return TrainSetup(**{"model": TINY, "micro_batch_size": 2, "seq_len": 128, **changes})


def lora_params(rank: int) -> int:
    per_layer = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 352), (128, 352), (352, 128)]
    return 3 * sum(rank * (rows + columns) for rows, columns in per_layer)


def steady(setup: TrainSetup) -> int:
    return trace(setup, on_gpu=False, all_layers=True).phases["save"].num_bytes


def scalars(setup: TrainSetup) -> int:
    """Fused AdamW keeps a float32 step counter of each parameter on the device."""
    return 4 * len(trained_parameters(build_model(setup, meta=True)))


@pytest.mark.parametrize(
    ("changes", "num_bytes"),
    [
        ({"method": "full"}, NUM_PARAMS * (2 + 4)),
        ({"method": "full", "weights_dtype": "float32"}, NUM_PARAMS * (4 + 8)),
        ({"method": "full", "optimizer": "sgd"}, NUM_PARAMS * 2),
        ({"method": "full", "master_weights": "float32"}, NUM_PARAMS * (2 + 4 + 8)),
        ({"method": "full", "optimizer_in_backward": True}, NUM_PARAMS * (2 + 4)),
        ({"method": "lora", "rank": 8}, NUM_PARAMS * 2 + lora_params(8) * 12),
        ({"method": "lora", "rank": 8, "adapter_dtype": "bfloat16"}, NUM_PARAMS * 2 + lora_params(8) * 6),
    ],
)
def test_what_stays_between_steps_is_weights_adapters_and_states_to_the_byte(changes, num_bytes):
    assert steady(setup_of(**changes)) == num_bytes + INV_FREQ_BYTES


def test_fused_adamw_keeps_a_counter_of_each_parameter():
    setup = setup_of(method="full", optimizer="adamw-fused")
    assert steady(setup) == NUM_PARAMS * 6 + INV_FREQ_BYTES + scalars(setup)


@pytest.mark.parametrize(
    ("quant", "bytes_per_block", "constants"),
    [("nf4", 32 + 4, 16 * 4), ("nf4-double", 32 + 1, (16 + 256 + 1) * 4)],
)
def test_packed_weights_take_half_a_byte_and_their_constants(quant, bytes_per_block, constants):
    linears = [(128, 128)] * 2 + [(128, 64)] * 2 + [(128, 352)] * 3
    blocks = [rows * columns // 64 for rows, columns in linears]
    nested = sum(4 * -(-b // 256) for b in blocks) if quant == "nf4-double" else 0
    packed = 3 * (sum(blocks) * bytes_per_block + nested + len(linears) * constants)
    others = NUM_PARAMS - 3 * 64 * sum(blocks)
    setup = setup_of(method="qlora", quant=quant, kbit_upcast=False, rank=8)
    assert steady(setup) == packed + others * 2 + lora_params(8) * 12 + INV_FREQ_BYTES


def measure_step(setup: TrainSetup) -> int:
    """Peak bytes of the second step's tensors, from the allocations that torch's profiler saw on this CPU."""
    model = build_model(setup)
    optimizer = build_optimizer(setup, model)
    step = TrainStep(setup, model, optimizer)
    batch = _real_batch(setup)
    step([batch], num_items=setup.tokens_per_micro_batch)
    gc.collect()
    states = [v for state in optimizer.state.values() for v in state.values()]  # type: ignore[attr-defined]
    held = [*model.parameters(), *model.buffers(), *batch.values()]
    held += [s for s in states if isinstance(s, torch.Tensor) and s.ndim]
    alive = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step([batch], num_items=setup.tokens_per_micro_batch)
    events = profile.profiler.kineto_results.events()
    current = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    assert current == 0
    return alive + peak


def _real_batch(setup: TrainSetup) -> dict[str, torch.Tensor]:
    shape = (setup.micro_batch_size, setup.seq_len)
    positions = torch.arange(setup.seq_len).expand(shape).contiguous()
    ids = torch.randint(0, 2000, shape)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full", "weights_dtype": "float32"},
        pytest.param(
            {"method": "full", "weights_dtype": "float32", "checkpointing": "none"}, marks=pytest.mark.slow
        ),
        pytest.param({"method": "lora"}, marks=pytest.mark.slow),
        pytest.param(
            {"method": "lora", "checkpointing": "none", "attention": "eager"}, marks=pytest.mark.slow
        ),
        {"method": "lora", "weights_dtype": "float32", "autocast": "bfloat16"},
        # in bfloat16 oneDNN's scratch of the head's product, which is no tensor, would decide a model this small
        {"method": "full", "weights_dtype": "float32", "loss": "chunked", "optimizer": "adamw-fused"},
        {"method": "full", "optimizer": "sgd", "checkpointing": "none", "dropout": 0.1},
    ],
)
def test_the_trace_agrees_with_what_the_cpu_allocated(changes):
    setup = setup_of(**changes)
    assert trace(setup, on_gpu=False, all_layers=True).peak_bytes == pytest.approx(
        measure_step(setup), rel=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full"},
        {"method": "lora", "checkpointing": "none"},
        {"method": "qlora", "autocast": "bfloat16"},
    ],
)
def test_two_shallow_models_give_what_all_layers_give(changes):
    setup = setup_of(**changes, model={**TINY, "num_hidden_layers": 7})
    shallow, whole = trace(setup), trace(setup, all_layers=True)
    assert shallow.depths.shallow == (3, 4)
    assert whole.depths.shallow is None
    for phase, peak in whole.phases.items():
        # Terms are rounded one by one.
        assert shallow.phases[phase].num_bytes == pytest.approx(peak.num_bytes, abs=8), phase
        assert shallow.phases[phase].terms == pytest.approx(peak.terms, abs=1), phase


@pytest.mark.slow
def test_layers_of_several_kinds_are_traced_by_a_period():
    kinds = ["sliding_attention", "full_attention"] * 4
    config = {
        **{k: v for k, v in TINY.items() if k != "num_hidden_layers"},
        "model_type": "gemma2",
        "head_dim": 32,
        "num_hidden_layers": 8,
        "layer_types": kinds,
    }
    setup = setup_of(model=config, attention="eager")
    shallow, whole = trace(setup), trace(setup, all_layers=True)
    assert shallow.depths.shallow == (4, 6)
    assert shallow.peak_bytes == pytest.approx(whole.peak_bytes, abs=8)


def test_the_peak_is_explained_by_its_largest_tensors():
    result = trace(setup_of(method="full", model={**TINY, "vocab_size": 50_000}))
    assert result.peak_phase == "backward"
    assert result.operator == "_log_softmax_backward_data"
    logits = 2 * 128 * 50_000
    # Float32: the saved log-softmax, the gradient of the loss, and that of the logits.
    assert result.terms["logits"] == 12 * logits
    assert {t.num_bytes for t in result.largest[:3]} == {4 * logits}
    assert sum(result.terms.values()) == result.peak_bytes


def test_accumulated_gradients_are_there_in_the_next_forward():
    one, four = (trace(setup_of(method="full", grad_accum_steps=n), on_gpu=False) for n in (1, 4))
    assert four.phases["forward"].num_bytes - one.phases["forward"].num_bytes >= 2 * NUM_PARAMS


def test_states_of_large_tensors_are_paged_out():
    device = trace(setup_of(method="full", optimizer="adamw-8bit"), all_layers=True)
    paged = trace(setup_of(method="full", optimizer="paged-adamw-8bit"), all_layers=True)
    # Only embedding and head have 100,000 elements and more: two byte states each.
    assert device.phases["save"].num_bytes - paged.phases["save"].num_bytes == 2 * 2 * 2000 * 128


@pytest.mark.slow
def test_work_does_not_grow_with_depth():
    def work(num_layers: int) -> int:
        return trace(setup_of(model={**TINY, "num_hidden_layers": num_layers})).timeline.num_ops

    assert work(126) == work(8)


# --- CUDA's rules


def allocations(run: Any, **options: Any) -> list[tuple[tuple[int, ...], str, bool]]:
    """Shape, dtype and whether it is still alive of everything that `run` allocated under CUDA's rules."""
    tracker = Tracker(workspaces=WORKSPACES)
    with cuda_rules(**{"autocast": False, **options}), FakeTensorMode(), tracker:
        kept = run()
        made = [(s.shape, s.dtype, s.freed_at is None) for s in tracker.storages]
        del kept
    return made


def attend(dtype: torch.dtype, heads: int, kv_heads: int, **options: Any) -> list[Any]:
    def run() -> torch.Tensor:
        query = torch.empty((2, heads, 100, 16), dtype=dtype, requires_grad=True)
        key, value = (torch.empty((2, kv_heads, 100, 16), dtype=dtype) for _ in range(2))
        out: torch.Tensor = functional.scaled_dot_product_attention(
            query, key, value, enable_gqa=kv_heads != heads, **options
        )
        return out

    return allocations(run)[3:]


def test_flash_attention_keeps_its_output_and_a_float32_log_sum_exp():
    kept = [(shape, dtype) for shape, dtype, _ in attend(torch.bfloat16, 4, 2, is_causal=True)]
    assert kept == [((2, 100, 4, 16), "bfloat16"), ((2, 4, 100), "float32")]


def test_a_mask_takes_the_memory_efficient_kernel_with_an_additive_bias():
    def run() -> torch.Tensor:
        query = torch.empty((2, 4, 100, 16), dtype=torch.bfloat16, requires_grad=True)
        mask = torch.empty((2, 1, 100, 100), dtype=torch.bool)
        out: torch.Tensor = functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        return out

    made = allocations(run)
    assert ((2, 1, 100, 100), "bfloat16", True) in made
    # The log-sum-exp is padded to a multiple of 32 tokens.
    assert ((2, 4, 128), "float32", True) in made


def test_float32_with_grouped_heads_falls_back_to_all_scores():
    shapes = [shape for shape, _, _ in attend(torch.float32, 4, 2, is_causal=True)]
    assert any(shape[-2:] == (100, 100) for shape in shapes)
    equal_heads = [shape for shape, _, _ in attend(torch.float32, 4, 4, is_causal=True)]
    assert not any(shape[-2:] == (100, 100) for shape in equal_heads)


class Keep(torch.autograd.Function):
    """Holds on to the gradient that it is given."""

    kept: list[torch.Tensor] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        Keep.kept.append(grads[0])
        return grads[0] * 1


@pytest.mark.parametrize(("branch", "num_sums"), [(torch.exp, 0), (Keep.apply, 1)])
def test_a_second_gradient_is_added_to_the_first_unless_somebody_holds_it(branch, num_sums):
    with FakeTensorMode(), Tracker() as tracker:
        tracker.begin("backward")
        x = torch.empty(3, 4, requires_grad=True) * 1
        (x + branch(x)).sin().sum().backward()
        Keep.kept.clear()
    assert sum(s.op == "add" for s in tracker.storages) == 1 + num_sums


def test_flash_attention_takes_a_window_and_no_mask():
    model = {**TINY, "model_type": "mistral", "sliding_window": 64}
    masked, flash = (trace(setup_of(model=model, attention=name)) for name in ("sdpa", "flash"))
    masks = [(s.shape, s.dtype) for s in masked.timeline.storages if s.shape[-2:] == (128, 128)]
    assert masks
    bools = [s for s in flash.timeline.storages if s.dtype == "bool" and s.shape[-2:] == (128, 128)]
    assert not bools


def test_flash_attention_needs_16_bits():
    with pytest.raises(SetupError, match="attention: flash takes 16-bit heads"):
        trace(setup_of(method="full", weights_dtype="float32", attention="flash"))


def test_dropout_keeps_a_bool_mask():
    def run() -> torch.Tensor:
        x = torch.empty(64, requires_grad=True)
        return functional.dropout(x, 0.1, training=True)

    assert allocations(run)[1:] == [((64,), "float32", True), ((64,), "bool", True)]


def test_autocast_runs_cudas_float32_operators_in_float32():
    def dtypes() -> list[torch.dtype]:
        x = torch.empty((4, 8), dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            return [x.softmax(-1).dtype, x.exp().dtype, x.sum().dtype, (x @ x.T).dtype, x.relu().dtype]

    f32, bf16 = torch.float32, torch.bfloat16
    with cuda_rules(autocast=True):
        assert dtypes() == [f32, f32, f32, bf16, bf16]
    assert dtypes() != [f32, f32, f32, bf16, bf16], "the CPU's own lists are back"


def test_libraries_that_ask_for_cudas_autocast_see_the_traced_one():
    # PEFT decides by it whether a 4-bit layer's input is copied for each adapter.
    with cuda_rules(autocast=True):
        assert not torch.is_autocast_enabled()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.is_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.is_autocast_enabled()


def test_a_4bit_product_of_many_rows_unpacks_its_weight():
    def held(num_rows: int) -> list[tuple[int, ...]]:
        rows = torch.empty((num_rows, 128), dtype=torch.bfloat16, device="meta")
        packed = torch.empty((128 * 352 // 2, 1), dtype=torch.uint8, device="meta")
        absmax = torch.empty(704, device="meta")
        return [tuple(t.shape) for t in gemm_4bit_workspace(rows, packed, (352, 128), absmax, 64, "nf4")]

    assert held(1537) == [(352, 128)]
    assert held(1536) == []


def test_int8_looks_for_outliers_in_float16():
    traced = trace(setup_of(method="qlora", quant="int8"), all_layers=True)
    made = {(s.shape, s.dtype) for s in traced.timeline.storages if s.op == "int8_vectorwise_quant"}
    assert {((256, 128), "float16"), ((256, 128), "bool"), ((256, 128), "int8")} <= made


def test_tracing_leaves_no_trace():
    before = functional.scaled_dot_product_attention, functional.dropout
    trace(setup_of(autocast="bfloat16"), all_layers=True)
    assert (functional.scaled_dot_product_attention, functional.dropout) == before
    assert gc.isenabled()


# --- estimates and errors


def test_an_estimate_from_a_trace_keeps_the_contract():
    machine = Machine(gpu=find_gpu("rtx-4090"))
    answer = trace_estimate(setup_of(), machine)
    memory = answer.memory
    assert answer.source == "trace"
    assert memory.peak_allocated_bytes == max(memory.phases.values())
    assert memory.terms["fragmentation"] >= 0
    # Two cuBLAS workspaces are inside.
    assert memory.terms["workspace"] >= 2 * 8 * MIB
    assert answer.fit.verdict == "fits"


@pytest.mark.parametrize(
    "changes",
    [
        {"sharding": "zero3", "num_gpus": 2},
        {"offload": "optimizer", "sharding": "fsdp", "num_gpus": 2},
        {"compile": True},
        {"objective": "seq-cls"},
    ],
)
def test_what_the_trace_would_get_wrong_is_refused(changes):
    with pytest.raises(NotModelledError, match=next(iter(changes))):
        trace_estimate(setup_of(**changes), Machine(gpu=find_gpu("rtx-4090")))


def test_bad_setups_are_one_clear_error():
    with pytest.raises(SetupError, match="targets"):
        trace(setup_of(targets=("no_such_module",)))
    with pytest.raises(ConfigError, match="read the config"):
        trace(setup_of(model={**TINY, "model_type": "no-such-type"}))
    with pytest.raises(NotModelledError, match="selective"):
        trace(setup_of(checkpointing="selective"))


def test_recording_the_same_step_twice_gives_the_same_allocations():
    first, second = (record(setup_of(), on_gpu=True) for _ in range(2))
    assert list(first.requests()) == list(second.requests())


def test_what_blocks_keep_beyond_large_weights_is_counted_by_trace_and_closed_form() -> None:
    """Two tables of 11.5 MiB lie in segments of 12 MiB, whose rest isn't split off."""
    model = {**TINY, "hidden_size": 512, "vocab_size": 11_776, "tie_word_embeddings": False}
    setup = TrainSetup(model=model, from_scratch=True, method="lora", seq_len=64)
    machine = Machine(gpu=find_gpu("rtx-4090"))
    weights = [answer(setup, machine).memory.terms["weights"] for answer in (trace_estimate, estimate)]
    asked = trace(setup).terms["weights"]
    assert weights[0] - asked == MIB
    assert weights[1] == pytest.approx(weights[0], abs=16_384)
