"""Every family that transformers builds a causal language model for: traced, or refused in one line that is known."""

from __future__ import annotations

from typing import Any

import pytest

from planner.errors import FinefitError
from planner.setup import TrainSetup

pytestmark = pytest.mark.train

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "moe_intermediate_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "encoder_layers": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "vocab_size": 1000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNSHRINKABLE = "a shrunk default config isn't a model"
REFUSED = {
    "blt": "gives a shape that depends on values",
    "cpmant": "activation checkpointing",
    "ctrl": "activation checkpointing",
    "gpt_neox_japanese": "activation checkpointing",
    "jetmoe": "activation checkpointing",
    "openai-gpt": "activation checkpointing",
    "xlm": "activation checkpointing",
    "xlnet": "activation checkpointing",
    "gemma3n": "timm",
    "musicgen": "Multiple valid text configs",
    "musicgen_melody": "Multiple valid text configs",
    "rwkv": "operators without end",
    "xlstm": "operators without end",
    "xmod": "Input language unknown",
    **dict.fromkeys(
        (
            *(
                "axk1",
                "beam",
                "codegen",
                "deepseek_v3",
                "deepseek_v32",
                "gptj",
                "mamba2",
                "mimo_v2_flash",
                "youtu",
                "zaya",
            ),
            *("bailing_hybrid", "cohere_compass_text", "dbrx", "deepseek_v2", "dots1", "dots3_note"),
            *("dots3_note_text", "gemma3n_text", "gemma4", "gemma4_assistant", "gemma4_text"),
            *("gemma4_unified", "gemma4_unified_assistant", "gemma4_unified_text", "gpt_neo"),
            *("hunyuan_v1_dense", "hunyuan_v1_moe", "kimi_linear", "lfm2_moe", "longcat_flash", "ministral"),
            *("nemotron", "qwen4_exp", "qwen4_exp_text", "reformer", "zamba", "zamba2"),
        ),
        UNSHRINKABLE,
    ),
}
"""Families that can't be traced here and what the line says, for the releases that finefit is developed with."""


def causal_families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(family: str) -> dict[str, Any]:
    """The family's default config with small sizes."""
    import transformers

    config = transformers.CONFIG_MAPPING[family]()
    text = config.get_text_config()
    small = {name: size for name, size in SIZES.items() if isinstance(text.__dict__.get(name), int)}
    if text is config:
        return {"model_type": family, **small}
    key = next(name for name in config.sub_configs if getattr(config, name, None) is text)
    return {"model_type": family, key: small}


def try_trace(family: str) -> str:
    """How it ended: an empty text, or the line."""
    from bench.trace.run import trace

    line = ""
    for attention in ("sdpa", "eager"):
        setup = {"method": "full", "seq_len": 32, "attention": attention}
        try:
            traced = trace(TrainSetup(model=small_config(family), **setup))
        except FinefitError as error:
            line = str(error)
            continue
        assert traced.peak_bytes > 0
        return ""
    return line


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_family_is_traced_or_refused_in_one_known_line():
    wrong = {}
    for family in causal_families():
        expected = REFUSED.get(family)
        if expected == UNSHRINKABLE:
            continue
        line = try_trace(family) if expected != "Multiple valid text configs" else expected
        if (line == "") != (expected is None) or (expected or "") not in line or "\n" in line:
            wrong[family] = line or "traced"
    assert not wrong, "\n".join(f"{family}: {line}" for family, line in wrong.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65}, "can't build|can't be traced|read the config"),
        ({"num_attention_heads": 0}, "can't build|can't be traced|read the config"),
        ({"model_type": "no-such-type"}, "read the config"),
        ({"vocab_size": -1}, "can't build|read the config"),
    ],
)
def test_a_config_that_is_no_model_is_one_line(changes, message):
    from bench.trace.run import trace

    config = {"model_type": "llama", **{k: SIZES[k] for k in ("hidden_size", "vocab_size")}}
    with pytest.raises(FinefitError, match=message) as caught:
        trace(TrainSetup(model={**config, "num_hidden_layers": 2, **changes}, seq_len=32))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_kernel_that_a_family_has_not_is_one_line():
    from bench.trace.run import trace

    config = {"model_type": "gemma2", **{k: SIZES[k] for k in ("hidden_size", "vocab_size", "head_dim")}}
    with pytest.raises(FinefitError, match="attention: gemma2: transformers has no sdpa for it; use eager"):
        trace(TrainSetup(model=config, attention="sdpa", seq_len=32))
    assert trace(TrainSetup(model=config, attention="flash", seq_len=32)).peak_bytes > 0
