"""The proof of families.toml: every family against the class that transformers builds from the same config."""

from collections import Counter

import pytest
import transformers
from transformers.models.auto import modeling_auto

from family_configs import CONFIGS, label
from planner.families import family, model_types
from planner.hf_config import model_spec
from planner.layers import adapter_params, quantised_matrices
from planner.resolve import profile_spec, profiles
from planner.setup import CHOICES
from real_shapes import build_real, differences, real_shapes, spec_shapes

pytestmark = pytest.mark.train
every_config = pytest.mark.parametrize("config", CONFIGS, ids=label)
CLASSIFIERS = [
    "llama",
    "qwen2",
    "mixtral",
    "gemma3_text",
    "qwen3_5_text",
    "phi",
    "gpt2",
    "gpt_neox",
    "falcon",
    "opt",
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "deberta-v2",
    "t5",
    "bart",
]


def first_config(model_type):
    return next(config for config in CONFIGS if config["model_type"] == model_type)


def test_every_family_that_transformers_can_build_is_held_against_it():
    checked = {config["model_type"] for config in CONFIGS}
    buildable = {t for t in model_types() if not family(t).get("remote_code") and "text" not in family(t)}
    assert checked == buildable


@every_config
def test_the_layers_are_those_of_the_real_model(config):
    real = real_shapes(build_real(config))
    assert differences(real, spec_shapes(model_spec(config))) == []


def every_profile():
    """The first profile of each family at once, all others in the slow tier; remote code is never run."""
    seen = set()
    for name, entry in profiles():
        kind = entry["config"]["model_type"]
        if not entry.get("remote_code"):
            yield pytest.param(name, marks=[pytest.mark.slow] if kind in seen else [])
            seen.add(kind)


@pytest.mark.parametrize("name", list(every_profile()))
def test_a_profile_is_the_real_model(name):
    spec = profile_spec(name)
    config = dict(spec.config)
    if spec.architecture == "encoder-decoder":
        # Built without weights, T5 ties always; from_pretrained unties it where the file has two matrices.
        config["tie_word_embeddings"] = True
        spec = model_spec(config)
    assert differences(real_shapes(build_real(config)), spec_shapes(spec)) == []


@every_config
def test_the_sliding_layers_are_those_of_the_real_config(config):
    import transformers

    values = {key: value for key, value in config.items() if key != "model_type"}
    real = transformers.AutoConfig.for_model(config["model_type"], **values)
    kinds = Counter(getattr(real, "layer_types", None) or ())
    ours = Counter()
    for layer in model_spec(config).layers:
        ours["linear" if layer.mixer == "linear" else "sliding" if layer.window else "full"] += layer.count
    sliding = kinds["sliding_attention"] + kinds["chunked_attention"]
    linear = kinds["linear_attention"] + kinds["mamba"]
    full = sum(kinds.values()) - sliding - linear
    if kinds:
        assert ours == Counter(linear=linear, sliding=sliding, full=full)
    else:
        assert len(ours) == 1


@every_config
def test_all_linear_adapts_what_peft_adapts(config):
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        adapted = get_peft_model(build_real(config), LoraConfig(r=3, target_modules="all-linear"))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_params(model_spec(config), "all-linear", 3) == trainable


@every_config
def test_bitsandbytes_quantises_what_we_say(config):
    import bitsandbytes
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    from real_shapes import path_in_layer

    model = build_real(config)
    keep = get_keys_to_not_convert(model) + list(model._keep_in_fp32_modules or [])
    with torch.device("meta"):
        model = replace_with_bnb_linear(
            model, modules_to_not_convert=keep, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
    real = Counter(
        path_in_layer(name) for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)
    )
    ours = Counter()
    for layer, matrix in quantised_matrices(model_spec(config)):
        ours[matrix.path] += layer.count * matrix.copies
    assert ours == real


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_a_classifier_has_the_real_head(model_type):
    config = first_config(model_type)
    real = real_shapes(build_real(config, "AutoModelForSequenceClassification"))
    assert differences(real, spec_shapes(model_spec(config, objective="seq-cls"))) == []


MLP_NAMES = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["self_attn.o_proj", *MLP_NAMES]),
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("mixtral", ["o_proj", "gate"]),
        ("qwen2_moe", MLP_NAMES),
        ("qwen3_moe", MLP_NAMES),
        ("qwen3_moe", ["q_proj", "gate"]),
        ("deepseek_v3", ["q_a_proj", *MLP_NAMES]),
        ("gpt_oss", ["q_proj", "k_proj"]),
        ("bert", ["query", "output.dense"]),
        ("t5", ["q", "v"]),
    ],
)
def test_names_adapt_what_peft_adapts(model_type, targets):
    import torch
    from peft import LoraConfig, get_peft_model

    config = first_config(model_type)
    with torch.device("meta"):
        adapted = get_peft_model(build_real(config), LoraConfig(r=3, target_modules=targets))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_params(model_spec(config), targets, 3) == trainable


def test_the_attention_kernels_are_those_of_the_real_classes():
    names = {
        **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    checked = 0
    for model_type in sorted(t for t in set(model_types()) & set(names) if "text" not in family(t)):
        real = getattr(transformers, names[model_type])
        named_otherwise = getattr(real, "_compatible_flash_implementations", None)
        has = {
            "sdpa": real._supports_sdpa,
            "flash": real._supports_flash_attn and not named_otherwise,
            "eager": True,
        }
        assert [name for name in CHOICES["attention"] if has[name]] == list(
            family(model_type)["attentions"]
        ), model_type
        checked += 1
    assert checked > 40
