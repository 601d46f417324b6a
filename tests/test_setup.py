"""TrainSetup: every field typed, ranged and documented; contradictions named; the round trip; nothing else gets in."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import FinefitError, SetupError, UnknownNameError
from planner.methods import find_method
from planner.setup import CHOICES, TrainSetup

FIELDS = {f.name: f for f in dataclasses.fields(TrainSetup)}


@st.composite
def setups(draw):
    """Setups that could have been written by a user: a few fields changed, contradictions left out."""
    changes = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "model": st.sampled_from(["llama-3.1-8b", "/some/folder", ""])
                | st.fixed_dictionaries({"model_type": st.just("llama"), "hidden_size": st.integers(1, 99)}),
                "method": st.sampled_from(["lora", "full"]),
                "rank": st.integers(1, 256),
                "alpha": st.integers(1, 64) | st.floats(0.5, 64),
                "dropout": st.floats(0, 0.9),
                "targets": st.just("all-linear")
                | st.lists(st.sampled_from(["q_proj", "v_proj", "o_proj"]), min_size=1, max_size=3),
                "weights_dtype": st.sampled_from(CHOICES["weights_dtype"]),
                "autocast": st.sampled_from(CHOICES["autocast"]),
                "micro_batch_size": st.integers(1, 64),
                "grad_accum_steps": st.integers(1, 64),
                "seq_len": st.integers(1, 100_000),
                "checkpointing": st.sampled_from(CHOICES["checkpointing"]),
                "attention": st.sampled_from(CHOICES["attention"]),
                "loss": st.sampled_from(CHOICES["loss"]),
                "learning_rate": st.none() | st.floats(1e-9, 1),
                "max_grad_norm": st.none() | st.floats(0.1, 10),
                "max_steps": st.none() | st.integers(1, 10_000),
                "seed": st.integers(0, 2**32 - 1),
                "compile": st.booleans(),
            },
        )
    )
    return TrainSetup(**changes)


@given(setups())
def test_the_round_trip_through_json(setup):
    text = json.dumps(setup.to_dict())
    assert TrainSetup.from_dict(json.loads(text)) == setup


def test_to_dict_has_every_field_and_shares_nothing():
    config = {"model_type": "llama"}
    setup = TrainSetup(model=config, targets=["q_proj"])
    plain = setup.to_dict()
    assert set(plain) == set(FIELDS)
    plain["model"]["model_type"] = plain["targets"][0] = "changed"
    assert setup.model == {"model_type": "llama"}
    assert setup.targets == ("q_proj",)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(sorted(FIELDS)) | st.text(max_size=12)


@given(st.dictionaries(keys, json_values, max_size=6))
def test_any_mapping_is_a_setup_or_one_clear_error(values):
    try:
        setup = TrainSetup.from_dict(values)
    except FinefitError as error:
        assert "\n" not in str(error)
        assert error.exit_code == 2
    else:
        assert TrainSetup.from_dict(setup.to_dict()) == setup


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_says_what_it_is_and_refuses_another_type(name):
    assert FIELDS[name].metadata["help"]
    with pytest.raises(SetupError) as caught:
        TrainSetup(**{name: object()})
    assert caught.value.field == name
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_a_closed_choice_names_its_values(name):
    with pytest.raises(SetupError, match="is not one of") as caught:
        TrainSetup(**{name: "something else"})
    for choice in CHOICES[name]:
        assert str(choice) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("rank", -4),
        ("seq_len", 0),
        ("micro_batch_size", 0),
        ("grad_accum_steps", 0),
        ("num_gpus", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("eval_fraction", 1.0),
        ("eval_batch_size", 0),
        ("epochs", 0),
        ("epochs", float("inf")),
        ("max_steps", 0),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("weight_decay", -1),
        ("max_grad_norm", 0),
        ("warmup_steps", -1),
        ("seed", -1),
        ("alpha", 0),
    ],
)
def test_a_number_out_of_range_is_refused(name, value):
    with pytest.raises(SetupError, match="outside") as caught:
        TrainSetup(**{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if str(f.type).startswith(("int", "float"))])
def test_true_is_no_number(name):
    with pytest.raises(SetupError):
        TrainSetup(**{name: True})


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.type == "bool"])
def test_one_is_no_truth_value(name):
    with pytest.raises(SetupError):
        TrainSetup(**{name: 1})


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("quant", {"method": "lora", "quant": "nf4"}),
        ("sharding", {"method": "qlora", "sharding": "zero3", "num_gpus": 2}),
        ("sharding", {"num_gpus": 2}),
        ("sharding", {"sharding": "device_map"}),
        ("num_nodes", {"num_gpus": 3, "num_nodes": 2, "sharding": "ddp"}),
        ("offload", {"offload": "optimizer"}),
        ("offload", {"offload": "params+optimizer", "sharding": "zero2", "num_gpus": 2}),
        ("packing", {"packing": True, "objective": "dpo"}),
        ("padding_free", {"padding_free": True, "attention": "eager"}),
        ("optimizer_in_backward", {"optimizer_in_backward": True, "grad_accum_steps": 2}),
        ("optimizer_in_backward", {"optimizer_in_backward": True, "sharding": "ddp", "num_gpus": 2}),
        ("master_weights", {"master_weights": "float32", "weights_dtype": "float32"}),
        ("targets", {"targets": ["q_proj", ""]}),
        ("targets", {"targets": ["q_proj", 3]}),
    ],
    ids=str,
)
def test_a_contradiction_names_its_field(field, changes):
    with pytest.raises(SetupError) as caught:
        TrainSetup(**changes)
    assert caught.value.field == field


def test_an_unknown_key_names_its_neighbours():
    with pytest.raises(SetupError, match="seq_len"):
        TrainSetup.from_dict({"seqlen": 10})
    with pytest.raises(SetupError, match="no such field"):
        TrainSetup.from_dict({"zzzzzz": 10})


def test_what_one_field_implies_of_another():
    assert TrainSetup(method="qlora").quant == "nf4-double"
    assert TrainSetup(method="qlora", quant="int8").quant == "int8"
    assert TrainSetup().quant is None
    assert TrainSetup(targets=["a", "b"]).targets == ("a", "b")


def test_a_setup_never_changes():
    setup = TrainSetup()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setup.rank = 3
    assert setup.with_(rank=3).rank == 3
    assert setup.rank == 16
    with pytest.raises(SetupError):
        setup.with_(rank=0)


def test_the_global_batch_counts_ranks_but_not_the_cards_of_one_split_model():
    sizes = {"micro_batch_size": 2, "grad_accum_steps": 3, "num_gpus": 4}
    assert TrainSetup(sharding="fsdp", **sizes).global_batch_size == 24
    assert TrainSetup(sharding="device_map", **sizes).global_batch_size == 6
    assert TrainSetup(micro_batch_size=2, seq_len=100).tokens_per_micro_batch == 200


def test_the_label_of_a_model():
    assert TrainSetup(model="llama-3.1-8b").model_label == "llama-3.1-8b"
    assert TrainSetup(model={"model_type": "llama"}).model_label == "llama"
    assert TrainSetup(model={"_name_or_path": "mine", "model_type": "llama"}).model_label == "mine"
    assert TrainSetup(model={}).model_label


@pytest.mark.parametrize("name", ["x" * 5000, "../lora", "__init__", "lora.py", ""])
def test_a_method_s_name_never_reaches_the_file_system(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown method"):
        find_method(name)
