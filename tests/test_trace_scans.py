"""Stand-ins for kernels of linear attention and state spaces: what they keep, and that no reference loop is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.trace import mamba, scans
from bench.trace.run import trace
from bench.trace.tracker import Tracker
from planner.errors import NotModelledError
from planner.setup import TrainSetup

pytestmark = pytest.mark.train

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "falcon_mamba": {},
    "qwen3_next": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "num_experts_per_tok": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "jamba": {"num_experts": 4},
    "zamba": {"num_hidden_layers": 8},
    "bamba": {},
    "granitemoehybrid": {},
    "falcon_h1": {},
    "olmo_hybrid": {},
    "kimi_linear": {"num_experts": 8, "num_experts_per_token": 2},
}
NO_SDPA = ("mamba", "mamba2", "falcon_mamba")
TOKENS = 256


def family_setup(name: str, **changes: Any) -> TrainSetup:
    attention = "eager" if name in NO_SDPA else "sdpa"
    options = {"method": "full", "seq_len": TOKENS, "checkpointing": "none", "attention": attention}
    return TrainSetup(model={"model_type": name, **SMALL, **FAMILIES[name]}, **{**options, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_work_does_not_grow_with_the_tokens(name):
    short, long = (trace(family_setup(name, seq_len=n)) for n in (TOKENS, 8 * TOKENS))
    assert short.timeline.num_ops == long.timeline.num_ops
    assert long.peak_bytes > short.peak_bytes


def kept_by(run: Callable[[], Any]) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of what `run` made and what is still alive, without its inputs."""
    with FakeTensorMode(), Tracker() as tracker:
        result = run()
        alive = [(s.shape, s.dtype) for s in tracker.storages if s.freed_at is None]
        del result
    return alive


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def test_a_convolution_keeps_its_inputs_and_nothing_else():
    def run() -> list[Any]:
        x, weight = tensor(2, 32, TOKENS), tensor(32, 4)
        return [x, weight, scans.causal_conv1d(x, weight, activation="silu")]

    assert kept_by(run)[2:] == [((2, 32, TOKENS), "bfloat16")]


def test_a_selective_scan_keeps_a_state_every_2048_tokens_and_its_ungated_output():
    tokens = 2 * 2048 + 1

    def run() -> list[Any]:
        u, delta, z = (tensor(1, 32, tokens) for _ in range(3))
        A, B, C = tensor(32, 16, dtype=torch.float32), tensor(1, 16, tokens), tensor(1, 16, tokens)
        return [u, delta, A, B, C, z, mamba.selective_scan(u, delta, A, B, C, z=z)]

    assert kept_by(run)[6:] == [((1, 32, 3, 32), "float32"), *[((1, 32, tokens), "bfloat16")] * 2]


def test_a_chunked_scan_keeps_its_decays_in_float32():
    def run() -> list[Any]:
        x, dt, A = tensor(2, TOKENS, 8, 16), tensor(2, TOKENS, 8), tensor(8, dtype=torch.float32)
        B, C = (tensor(2, TOKENS, 1, 32) for _ in range(2))
        return [x, dt, A, B, C, mamba.chunk_scan(x, dt, A, B, C, 64)]

    assert sorted(kept_by(run)[5:]) == [((2, 8, 4, 64), "float32"), ((2, TOKENS, 8, 16), "bfloat16")]


def test_a_gated_delta_rule_keeps_a_triangle_of_each_chunk():
    def run() -> list[Any]:
        q, k, v = tensor(2, TOKENS, 4, 16), tensor(2, TOKENS, 4, 16), tensor(2, TOKENS, 8, 32)
        g, beta = tensor(2, TOKENS, 8, dtype=torch.float32), tensor(2, TOKENS, 8)
        out, _ = scans.gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
        return [q, k, v, g, beta, out]

    per_head = [((2, TOKENS, 4), "float32")] * 2
    expected = [((2, TOKENS, 4, 16), "bfloat16")] * 2 + per_head + [((2, TOKENS, 8), "float32")]
    expected += [((2, TOKENS, 8, 64), "bfloat16"), ((2, TOKENS, 8, 32), "bfloat16")]
    assert sorted(kept_by(run)[5:]) == sorted(expected)


def test_a_kernel_without_a_stand_in_is_refused(monkeypatch):
    monkeypatch.delitem(scans.STAND_INS, "causal_conv1d_fn")
    with pytest.raises(NotModelledError, match="causal_conv1d_fn: no stand-in"):
        trace(family_setup("lfm2"))


def test_the_modeling_files_get_their_functions_back():
    from transformers.models.lfm2 import modeling_lfm2

    before = modeling_lfm2.causal_conv1d_fn
    trace(family_setup("lfm2"), all_layers=True)
    assert modeling_lfm2.causal_conv1d_fn is before


def test_a_loop_over_tokens_ends_in_one_line(monkeypatch):
    monkeypatch.setattr("bench.trace.run.MAX_OPS_PER_LAYER", 500)
    with pytest.raises(NotModelledError, match="a loop over tokens"):
        trace(family_setup("lfm2"), all_layers=True)
