"""Laws of profiles/models: names, facts, and parameter counts against the published ones."""

import re

import pytest

from planner.errors import ConfigError, FinefitError, NotModelledError, SetupError, UnknownNameError
from planner.families import model_types, raw_models
from planner.layers import adapter_params, module_names, target_matrices
from planner.resolve import model_names, profile_spec, profiles, resolve_model

ENTRIES = dict(profiles())
every_model = pytest.mark.parametrize("name", ENTRIES)
KEYS = {
    "required": {
        "hub_id",
        "license",
        "commercial",
        "parameters",
        "published",
        "published_by",
        "source",
        "config",
    },
    "optional": {
        "aliases",
        "featured",
        "modelscope_id",
        "note",
        "null_keys",
        "released_extra",
        "released_extra_is",
        "remote_code",
        "variants",
    },
}
UNITS = {"B": 1e9, "M": 1e6}


def test_the_catalogue_is_large_and_lists_each_name_once():
    names = [name for models in raw_models().values() for name in models]
    assert len(names) >= 80 and len(names) == len(set(names))
    assert len(model_names(featured=True)) < len(model_names()) == len(names)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "LLaMA-7B",
            "Llama-2-7b",
            "Llama-3-8B",
            "Llama-3.1-8B",
            "Llama-4-Scout-17B-16E",
            "Qwen-7B",
            "Qwen1.5-7B",
        ),
        *(
            "Qwen2-7B",
            "Qwen2.5-7B",
            "Qwen3-8B",
            "Qwen3.5-9B",
            "Mistral-7B",
            "Mixtral-8x7B",
            "gemma-2b",
            "gemma-2-2b",
        ),
        *(
            "gemma-3-4b",
            "gemma-4-E4B",
            "phi-4",
            "chatglm3-6b",
            "GLM-4-9B-0414",
            "Yi-6B",
            "Baichuan2-7B",
            "internlm2-7b",
        ),
        *(
            "DeepSeek-V3",
            "DeepSeek-R1-Distill-Qwen-7B",
            "gpt-oss-20b",
            "SmolLM2-135M",
            "TinyLlama",
            "OLMo-2-7B",
        ),
        *("granite-3.1-8b-base", "stablelm-2-1_6b", "falcon-7b", "gpt2", "gpt-neox-20b", "bert-base-uncased"),
        *("roberta-base", "flan-t5-base", "CodeGeeX2", "CodeGeeX4"),
    ],
)
def test_every_family_that_users_ask_for_is_there(name):
    assert resolve_model(name).num_params > 0


@every_model
def test_an_entry_has_all_its_facts_and_no_others(name):
    entry = ENTRIES[name]
    assert set(entry) >= KEYS["required"]
    assert set(entry) <= KEYS["required"] | KEYS["optional"]
    assert entry["commercial"] in ("yes", "yes, with conditions", "no")
    assert ("released_extra" in entry) == ("released_extra_is" in entry)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", i) for i in [entry["hub_id"], *entry.get("variants", [])])


@every_model
def test_the_computed_parameters_are_those_written_down(name):
    assert profile_spec(name).num_params == ENTRIES[name]["parameters"]


@every_model
def test_the_parameters_agree_with_the_published_count_to_its_last_digit(name):
    entry = ENTRIES[name]
    released = entry["parameters"] + entry.get("released_extra", 0)
    text = entry["published"]
    unit = UNITS.get(text[-1])
    if unit is None:
        assert released == int(text.replace(",", ""))
        return
    digits = len(text[:-1].partition(".")[2])
    assert f"{released / unit:.{digits}f}" == text[:-1]


@every_model
def test_a_model_is_found_by_each_of_its_names(name):
    entry = ENTRIES[name]
    for spelling in (
        name,
        name.upper(),
        name.replace("-", " "),
        entry["hub_id"],
        entry["hub_id"].split("/")[-1].lower(),
    ):
        assert resolve_model(spelling).name == name
    for alias in entry.get("aliases", []):
        assert resolve_model(alias).name == name
    for variant in entry.get("variants", []):
        spec = resolve_model(variant)
        assert spec.hub_id == variant
        assert spec.num_params == entry["parameters"]


@every_model
def test_a_spec_is_whole(name):
    spec = profile_spec(name)
    assert spec.license and spec.commercial and spec.source and spec.hub_id
    assert spec.num_active_params <= spec.num_params
    assert all(m.in_features > 0 and m.out_features > 0 for layer in spec.layers for m in layer.matrices)
    assert all(m.path.endswith(m.module) for layer in spec.layers for m in layer.matrices)
    assert adapter_params(spec, "all-linear", 8) > 0
    assert spec.family in model_types()


def test_active_parameters_of_mixtures_are_the_published_ones():
    active = {
        name: profile_spec(name).num_active_params
        for name in ("Mixtral-8x7B-v0.1", "Qwen3-30B-A3B", "DeepSeek-V3")
    }
    assert active["Mixtral-8x7B-v0.1"] == pytest.approx(12.9e9, rel=0.005)
    assert active["Qwen3-30B-A3B"] == pytest.approx(3.3e9, rel=0.02)
    assert active["DeepSeek-V3"] == pytest.approx(37e9, rel=0.03)


def test_models_with_remote_code_have_their_own_module_names():
    assert module_names(profile_spec("Qwen-7B")) == ["c_attn", "c_proj", "w1", "w2"]
    assert module_names(profile_spec("chatglm3-6b")) == [
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    ]
    assert module_names(profile_spec("Baichuan2-7B-Base"))[0] == "W_pack"
    with pytest.raises(SetupError, match="c_attn, c_proj, w1, w2"):
        target_matrices(profile_spec("Qwen-7B"), ["q_proj", "v_proj"])


def test_one_name_can_mean_two_modules_of_a_layer():
    paths = [matrix.path for _, matrix in target_matrices(profile_spec("Qwen-7B"), ["c_proj"])]
    assert paths == ["attn.c_proj", "mlp.c_proj"]


def test_half_of_a_fused_pair_is_refused():
    with pytest.raises(SetupError, match="w1 and w3"):
        target_matrices(profile_spec("Mixtral-8x7B-v0.1"), ["w1"])


def test_lora_of_smollm2_has_the_published_number_of_parameters():
    assert adapter_params(profile_spec("SmolLM2-135M"), "all-linear", 16) == 4_884_480


def test_an_unknown_name_is_answered_with_its_neighbours():
    with pytest.raises(UnknownNameError, match=r"Llama-3\.1-8B"):
        resolve_model("llama-3.1-9b")


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("qwen2_vl", "vision-language models are out of scope: the text part"),
        ("whisper", "audio models are out of scope"),
        ("vit", "vision models are out of scope"),
        ("qwen9", "nearest: qwen"),
        ("mamba", "not modelled"),
    ],
)
def test_what_is_not_modelled_is_said_by_name(model_type, words):
    with pytest.raises(NotModelledError, match=words):
        resolve_model({"model_type": model_type, "hidden_size": 64})


def test_a_diffusion_model_is_out_of_scope():
    with pytest.raises(NotModelledError, match="diffusion"):
        resolve_model({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"})


@pytest.mark.parametrize(
    "text", ["", " ", "\0", "a" * 5000, "../nowhere", "~nobody/x", "llama\n", "//", "a/b/c", "."]
)
def test_odd_names_are_one_line_errors(text):
    with pytest.raises(FinefitError) as caught:
        resolve_model(text)
    assert len(str(caught.value)) < 600


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="has no config"):
        resolve_model(str(tmp_path))
