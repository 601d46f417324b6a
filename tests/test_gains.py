"""What makes a run faster and smaller is chosen where it applies and can be run, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from family_configs import CONFIGS
from planner.catalog import find_gpu
from planner.errors import FinefitError
from planner.export import formats
from planner.families import attentions
from planner.gains import GAINS, gains
from planner.hf_config import model_spec
from planner.lengths import DataLengths
from planner.run_time import positions_per_row
from planner.search import plan
from planner.setup import TrainSetup
from planner.specs import Machine, ModelSpec
from planner.units import GIB

LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 4096,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300}
ALL = {"padding_free": True, "kernels": "fused", "loss": "chunked"}
PROCESSOR = replace(find_gpu("RTX 4090"), name="cpu", backend="cpu")
ROWS = DataLengths.of([40, 90, 200, 700], num_rows=400, source="a test")


def planned(
    config: dict[str, Any] = LLAMA, gpu: str = "RTX 4090", lengths: DataLengths | None = ROWS, **wishes: Any
) -> TrainSetup:
    profile = PROCESSOR if gpu == "cpu" else find_gpu(gpu)
    machine = Machine(gpu=profile, free_bytes=20 * GIB)
    model = model_spec(config)
    return plan({"model": config, **wishes}, machine, lengths=lengths, model=model).estimate.setup


def chosen(setup: TrainSetup) -> set[str]:
    return {gain.field for gain in GAINS if getattr(setup, gain.field) == gain.value}


@pytest.mark.parametrize("gpu", ["RTX 4090", "cpu"])
@pytest.mark.parametrize("wishes", [{}, {"packing": False}, {"objective": "pretrain"}, {"method": "lora-fa"}])
def test_a_plan_has_them_where_they_apply(gpu: str, wishes: dict[str, Any]) -> None:
    assert chosen(planned(gpu=gpu, **wishes)) == set(ALL)


@pytest.mark.parametrize(
    ("missing", "config", "changes"),
    [
        ({"padding_free"}, LLAMA, {"lengths": None}),
        ({"padding_free"}, LLAMA, {"lengths": DataLengths.of([512, 512], num_rows=9, source=""), "seq_len": 512}),
        ({"padding_free"}, LLAMA, {"attention": "eager"}),
        ({"padding_free"}, LLAMA, {"weights_dtype": "float32"}),
        ({"padding_free", "kernels"}, LLAMA, {"gpu": "T4"}),
        ({"padding_free"}, {**LLAMA, "model_type": "mistral", "sliding_window": 256}, {}),
        ({"padding_free"}, {**LLAMA, "model_type": "stablelm"}, {}),
        ({"padding_free"}, LLAMA, {"method": "prompt"}),
        ({"padding_free", "kernels"}, LLAMA, {"compile": True}),
        ({"kernels"}, LLAMA, {"method": "full", "weights_dtype": "float32", "autocast": "bfloat16"}),
        ({"kernels"}, GPT2, {"method": "full", "weights_dtype": "bfloat16"}),
        ({"loss"}, {**LLAMA, "model_type": "cohere", "logit_scale": 0.1}, {}),
        ({"loss"}, LLAMA, {"targets": ("q_proj", "lm_head")}),
        (set(ALL), LLAMA, {"objective": "dpo"}),
        (set(ALL), LLAMA, {"stack": "transformers 4.48.1, torch 2.4.1"}),
    ],
)  # fmt: skip
def test_where_one_does_not_apply_it_is_left(
    missing: set[str], config: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert chosen(planned(config, **changes)) == set(ALL) - missing


@pytest.mark.parametrize("wish", [{"padding_free": False}, {"kernels": "plain"}, {"loss": "full"}])
def test_what_the_user_names_stays(wish: dict[str, Any]) -> None:
    setup = planned(**wish)
    assert {name: getattr(setup, name) for name in wish} == wish
    assert chosen(setup) == set(ALL) - wish.keys()


def test_exporters_say_what_they_cannot_express() -> None:
    setup = planned(packing=False)
    for form in formats():
        left_out = form.left_out(setup)
        assert {"padding_free", "kernels"} <= left_out.keys(), form.name


def test_joined_rows_take_the_positions_of_their_tokens() -> None:
    setup = planned(packing=False)
    assert positions_per_row(setup, ROWS) == ROWS.kept_mean(setup.seq_len)
    packed = planned(packing=True)
    per_sequence = 1 / ROWS.packed_share(packed.seq_len)
    assert positions_per_row(packed, ROWS) == pytest.approx(per_sequence * ROWS.mean)
    assert positions_per_row(packed.with_(padding_free=False), ROWS) == packed.seq_len


def decoders() -> list[tuple[dict[str, Any], ModelSpec]]:
    by_type = {config["model_type"]: config for config in CONFIGS}
    found = [(config, model_spec(config)) for config in by_type.values()]
    return [(c, m) for c, m in found if m.architecture == "decoder" and "sdpa" in attentions(m)]


CANNOT_TRAIN = ("phimoe", "llama4_text")
"""LoRA on a router that gives more than a tensor fails in peft with any kernels."""


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.parametrize("config", [c for c, _ in decoders()], ids=lambda c: c["model_type"])
def test_what_is_chosen_for_a_family_is_what_it_runs(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joined rows are isolated, the head is plain, and a step gives the loss of one without."""
    import torch

    from bench.attention import check_isolation
    from bench.build import build_model, check_runnable, inner_model
    from bench.loss import check_head

    if config["model_type"] in CANNOT_TRAIN:
        pytest.skip("its step doesn't run at all")
    plain = TrainSetup(
        model=config, from_scratch=True, weights_dtype="float32", checkpointing="none", seq_len=32
    )
    lengths = DataLengths.of([5, 9], num_rows=2, source="")
    fields = {"model": config, "seq_len": 32, "weights_dtype": "float32"}
    found = gains(fields, model_spec(config), PROCESSOR, lengths)
    model = build_model(plain)
    modeling = __import__("sys").modules[type(inner_model(model)).__module__]
    if hasattr(modeling, "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
    assert runs(lambda: check_isolation(build_model(plain.with_(padding_free=True)))) == (
        "padding_free" in found
    )
    assert "loss" not in found or runs(lambda: check_head(model))
    ids = torch.arange(1, 33).view(2, 16)
    expected = model.eval()(input_ids=ids, use_cache=False).logits
    own = plain.with_(kernels=found.get("kernels", "plain"))
    check_runnable(own, "cpu")
    fused = build_model(own).eval()
    assert torch.allclose(fused(input_ids=ids, use_cache=False).logits, expected, atol=1e-4)


def runs(check: Any) -> bool:
    try:
        check()
    except FinefitError:
        return False
    return True
