import pytest

from planner.errors import ConfigError, NotModelledError
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
