"""Encoder-decoders: the step's loss is the model's own, and the trace takes them as from_pretrained builds them."""

import pytest

from planner.catalog import find_gpu
from planner.errors import SetupError
from planner.estimate import estimate
from planner.hf_config import model_spec
from planner.memory import MemoryModel
from planner.setup import TrainSetup
from planner.shapes import Shape
from planner.specs import Machine

T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 512,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
TIED_T5 = {**T5, "feed_forward_proj": "relu", "tie_word_embeddings": True}
BART = {
    "model_type": "bart",
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
MT5 = {**T5, "model_type": "mt5"}
every_model = pytest.mark.parametrize(
    "config", [T5, TIED_T5, MT5, BART], ids=["t5", "tied-t5", "mt5", "bart"]
)
MACHINE = Machine(gpu=find_gpu("rtx-4090"))


def setup_of(config, **changes):
    return TrainSetup(**{"model": config, "objective": "seq2seq", "seq_len": 32, **changes})


@pytest.mark.train
@every_model
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_the_step_s_loss_is_the_model_s_own(config, loss):
    import torch

    from bench.build import build_model
    from bench.loss import LOSSES
    from bench.step import no_phase

    setup = setup_of(config, method="full", weights_dtype="float32", checkpointing="none", loss=loss)
    model = build_model(setup).eval()
    ids, labels = torch.randint(3, 512, (2, 3, 16)).unbind()
    labels[0, 9:] = -100
    theirs = model(input_ids=ids, labels=labels).loss
    decoder_ids = model.prepare_decoder_input_ids_from_labels(labels)
    batch = {"input_ids": ids, "labels": labels, "decoder_input_ids": decoder_ids}
    ours = LOSSES[loss](model, batch, int((labels != -100).sum()), no_phase)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.train
@every_model
def test_what_is_traced_has_the_weights_that_the_planner_counts(config):
    from bench.build import build_model

    model = build_model(setup_of(config, method="full"), meta=True)
    assert sum(p.numel() for p in model.parameters()) == model_spec(config, objective="seq2seq").num_params


@pytest.mark.train
def test_t5_keeps_in_float32_and_unpacked_what_from_pretrained_keeps():
    from bench.build import build_model

    half = build_model(setup_of(T5, weights_dtype="float16"), meta=True)
    wide = {n.split(".")[-2] for n, p in half.named_parameters() if p.element_size() == 4 and "lora" not in n}
    assert wide in ({"wo"}, {"base_layer"})
    packed = build_model(setup_of(T5, method="qlora"), meta=True)
    kinds = {n.rpartition(".wo")[2]: type(m).__name__ for n, m in packed.named_modules() if n.endswith(".wo")}
    assert set(kinds.values()) == {"Linear"}


@pytest.mark.train
@pytest.mark.slow
@pytest.mark.parametrize("config", [T5, BART], ids=["t5", "bart"])
def test_a_step_is_traced(config):
    from bench.trace.estimate import trace_estimate

    memory = trace_estimate(setup_of(config, checkpointing="full"), MACHINE).memory
    assert memory.phases["backward"] > memory.phases["load"]


@pytest.mark.parametrize(
    ("model", "objective", "hint"),
    [("flan-t5-base", "sft", "seq2seq"), ("qwen3-0.6b", "seq2seq", "sft"), ("bart-base", "mlm", "seq2seq")],
)
def test_the_wrong_objective_names_the_right_one(model, objective, hint):
    with pytest.raises(SetupError, match=f"use {hint}"):
        estimate(TrainSetup(model=model, objective=objective), MACHINE)


@pytest.mark.parametrize(
    ("targets", "waits"), [(("q",), False), (("k",), True), (("EncDecAttention.v",), True), (("wo",), False)]
)
def test_the_encoder_s_output_waits_for_the_matrices_that_need_it(targets, waits):
    setup = setup_of(T5, targets=targets, checkpointing="none", adapter_dtype="bfloat16")
    run = MemoryModel(setup, model_spec(T5, objective="seq2seq")).run
    assert run.layering(Shape(64, 32)).keeps_source == waits


@pytest.mark.train
@pytest.mark.parametrize("weights_dtype", ["bfloat16", "float16"])
def test_t5_weighs_what_from_pretrained_would_load(weights_dtype):
    from bench.build import build_model

    setup = setup_of(T5, method="lora", weights_dtype=weights_dtype)
    model = build_model(setup, meta=True)
    built = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora" not in n)
    assert MemoryModel(setup, model_spec(T5, objective="seq2seq")).run.static()["weights"] == built


def test_longer_rows_cost_biases_that_more_rows_share():
    """T5's position biases have one value for each head and pair of positions, whatever the number of rows is."""
    model = MemoryModel(
        setup_of(T5, method="full", checkpointing="none"), model_spec(T5, objective="seq2seq")
    )
    long_rows, many_rows = model.at(1, 4096), model.at(8, 512)
    assert long_rows.phases["loss"] > many_rows.phases["loss"] + 4 * 4096**2
