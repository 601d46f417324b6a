import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from family_configs import CONFIGS, label
from planner.errors import ConfigError, FinefitError, NotModelledError
from planner.families import family, model_types
from planner.hf_config import model_spec

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def test_llama_3_1_8b_has_its_published_parameters():
    spec = model_spec(LLAMA)
    assert spec.num_params == 8_030_261_248
    assert [m.module for m in spec.layers[0].matrices] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


def test_experts_are_the_same_weights_however_they_are_stored():
    fused, split = model_spec(MIXTRAL), model_spec(MIXTRAL, experts_as_linears=True)
    assert fused.num_params == split.num_params == 46_702_792_704
    assert fused.num_active_params == split.num_active_params == 12_879_925_248
    assert {m.kind for m in split.layers[0].matrices} == {"linear"}


@pytest.mark.parametrize("value", [-1, 0, "4096", 4096.0, True, 10**30, [], {}])
def test_an_absurd_field_is_named_with_its_file(value):
    with pytest.raises(ConfigError, match=r"some/config\.json.*hidden_size"):
        model_spec({**LLAMA, "hidden_size": value}, where="some/config.json")


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match="intermediate_size"):
        model_spec({k: v for k, v in LLAMA.items() if k != "intermediate_size"})


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(ConfigError, match="num_attention_heads"):
        model_spec({**LLAMA, "num_attention_heads": 33, "num_key_value_heads": 33})


def test_an_unknown_model_type_names_its_neighbours():
    with pytest.raises(NotModelledError, match="llama"):
        model_spec({**LLAMA, "model_type": "lama"})


KEYS = sorted(
    {key for fam in model_types() for keys in family(fam).get("keys", {}).values() for key in keys}
    | {"text_config", "layer_types", "mlp_only_layers", "moe_layers", "feed_forward_proj", "pos_att_type"}
)
numbers = st.one_of(st.integers(), st.integers(0, 200), st.floats(), st.just(10**30))
leaves = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(list(model_types()))
)
json_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
)
configs = st.builds(
    lambda model_type, fields: {"model_type": model_type, **fields},
    st.sampled_from(list(model_types())) | leaves,
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), json_values, max_size=12),
)


@settings(max_examples=300, deadline=None)
@given(configs, st.booleans(), st.sampled_from([None, "seq-cls"]))
def test_any_mapping_gives_a_model_or_one_clear_line(config, experts_as_linears, objective):
    try:
        spec = model_spec(config, experts_as_linears=experts_as_linears, objective=objective)
    except FinefitError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert spec.num_params > 0
        assert 0 < spec.num_active_params <= spec.num_params


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CONFIGS), st.sampled_from(KEYS), json_values)
def test_one_wrong_field_in_a_good_config_never_crashes(config, key, value):
    try:
        spec = model_spec({**config, key: value})
    except FinefitError as error:
        assert "\n" not in str(error)
    else:
        assert spec.num_params > 0


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_experts_as_linears_hold_the_same_weights(config):
    fused, split = model_spec(config), model_spec(config, experts_as_linears=True)
    assert fused.num_params == split.num_params
    assert fused.num_active_params == split.num_active_params


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_the_parts_add_up(config):
    spec = model_spec(config)
    body = sum(layer.count * layer.num_params for layer in spec.layers)
    tied = 0 if spec.head is None or not spec.tied_head else spec.head.num_weights
    head = spec.head.num_weights + spec.head.num_biases - tied
    assert spec.num_params == spec.embedding_params + body + spec.final_params + head


def test_a_multi_modal_config_gives_its_text_part_and_says_so():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    spec = model_spec({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert spec.num_params == 3_880_263_168
    assert "vision" in spec.note and spec.family == "gemma3_text"


def test_a_multi_modal_config_without_its_text_part_is_refused():
    with pytest.raises(ConfigError, match="text_config"):
        model_spec({"model_type": "gemma3"})


def test_the_tie_of_a_multi_modal_config_holds_for_its_text_part():
    text = {**LLAMA, "model_type": "mistral"}
    del text["tie_word_embeddings"]
    tied = model_spec({"model_type": "mistral3", "tie_word_embeddings": True, "text_config": text})
    assert tied.tied_head and not model_spec({"model_type": "mistral3", "text_config": text}).tied_head


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10_001}, "more than 10000"),
        ({"num_key_value_heads": 5}, "num_key_value_heads = 5 doesn't divide"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings.*true or false"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 9},
            "num_experts_per_tok = 9 of 4",
        ),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "gemma2", "layer_types": "full_attention"}, "layer_types"),
    ],
)
def test_what_contradicts_itself_is_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        model_spec({**LLAMA, **changes})


def test_an_unknown_kind_of_layer_is_not_guessed():
    with pytest.raises(NotModelledError, match="hyper_attention"):
        model_spec({**LLAMA, "model_type": "gemma2", "layer_types": ["hyper_attention"] * 32})


def test_every_other_layer_of_gemma_2_slides():
    spec = model_spec({**LLAMA, "model_type": "gemma2", "sliding_window": 1024})
    assert {(layer.window, layer.count) for layer in spec.layers} == {(1024, 16), (None, 16)}
