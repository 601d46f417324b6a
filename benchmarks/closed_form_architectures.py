"""The architectures of the grid that compares closed form and trace: small models with realistic proportions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LLAMA_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
EAGER_OR_FLASH = ("eager", "flash", "eager")
BASE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "max_position_embeddings": 65536,
    "pad_token_id": 0,
}
NO_GROUPS = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
LATENT = {
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 768,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT_NAMES = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
GPT2 = {"n_embd": 1024, "n_layer": 4, "n_head": 16, "vocab_size": 16384, "n_positions": 4096}
FALCON = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "vocab_size": 16384}
ENCODER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "vocab_size": 30522,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A config.json, and what of the grid it takes.

    `only` narrows fields to the values that the model takes; `max_length` is the longest row, in tokens (batches
    grow instead); `attention_modules` are the targets of adapters on attention alone. `folds_experts`: PEFT adapts the
    experts' parameters with all linears, which takes no dropout.
    """

    config: Mapping[str, Any]
    attention_modules: tuple[str, ...] = LLAMA_NAMES
    objective: str = "sft"
    max_length: int = 65536
    folds_experts: bool = False
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def _decoder(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **BASE, **changes}


def _make(config: Mapping[str, Any], **options: Any) -> Architecture:
    return Architecture(config=config, **options)


FULL_LOSS = {"loss": ("full",)}
UNPACKED = {"packing": (False,)}
T5 = {
    "model_type": "t5",
    "d_model": 768,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "vocab_size": 16384,
}
BART = {
    "model_type": "bart",
    "d_model": 768,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "vocab_size": 16384,
    "max_position_embeddings": 1024,
}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _make(_decoder("llama", tie_word_embeddings=False)),
    "llama-tied-biased": _make(
        _decoder("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=96)
    ),
    "mistral-sliding": _make(_decoder("mistral", sliding_window=1024)),
    "qwen2": _make(_decoder("qwen2", tie_word_embeddings=True)),
    "qwen3": _make(_decoder("qwen3", head_dim=128)),
    "smollm3": _make(_decoder("smollm3")),
    "granite": _make(_decoder("granite", logits_scaling=8.0, embedding_multiplier=12.0), only=FULL_LOSS),
    "gemma-mqa": _make(_decoder("gemma", num_attention_heads=4, num_key_value_heads=1, head_dim=256)),
    "gemma2": _make(_decoder("gemma2", head_dim=64, sliding_window=1024), only={"attention": EAGER_OR_FLASH}),
    "gemma3": _make(_decoder("gemma3_text", head_dim=64, sliding_window=512)),
    "olmo": _make(_decoder("olmo")),
    "olmo2": _make(_decoder("olmo2")),
    "cohere": _make(_decoder("cohere", logit_scale=0.0625), only=FULL_LOSS),
    "cohere2-sliding": _make(_decoder("cohere2", sliding_window=1024, logit_scale=0.25), only=FULL_LOSS),
    "exaone4": _make(_decoder("exaone4", sliding_window=1024)),
    "starcoder2": _make(_decoder("starcoder2", intermediate_size=4096, sliding_window=None)),
    "stablelm": _make(_decoder("stablelm", use_qkv_bias=True)),
    "phi": _make(
        _decoder("phi", num_key_value_heads=16, intermediate_size=4096),
        attention_modules=("q_proj", "k_proj", "v_proj", "dense"),
    ),
    "phi3-fused": _make(_decoder("phi3"), attention_modules=("qkv_proj", "o_proj")),
    "glm4-sandwich": _make(_decoder("glm4", head_dim=64)),
    "gpt2": _make({"model_type": "gpt2", **GPT2}, max_length=4096, attention_modules=("c_attn",)),
    "gpt-bigcode-mqa": _make(
        {"model_type": "gpt_bigcode", **GPT2}, max_length=4096, attention_modules=("c_attn",)
    ),
    "gptj": _make(
        {"model_type": "gptj", **GPT2, "rotary_dim": 32},
        attention_modules=("q_proj", "k_proj", "v_proj", "out_proj"),
        max_length=4096,
        only={"attention": EAGER_OR_FLASH},
    ),
    "gpt-neox": _make(
        {"model_type": "gpt_neox", **NO_GROUPS, "intermediate_size": 4096},
        attention_modules=("query_key_value", "dense"),
    ),
    "bloom-alibi": _make(
        {"model_type": "bloom", "hidden_size": 1024, "n_layer": 4, "n_head": 16, "vocab_size": 16384},
        attention_modules=("query_key_value",),
        only={"attention": ("eager",), **UNPACKED},
    ),
    "falcon-mqa": _make({"model_type": "falcon", **FALCON}, attention_modules=("query_key_value",)),
    "falcon-new": _make(
        {"model_type": "falcon", **FALCON, "new_decoder_architecture": True, "num_kv_heads": 4},
        attention_modules=("query_key_value",),
    ),
    "opt": _make(
        {"model_type": "opt", **NO_GROUPS, "ffn_dim": 4096, "max_position_embeddings": 4096},
        attention_modules=("q_proj", "k_proj", "v_proj", "out_proj"),
        max_length=4096,
        only=UNPACKED,
    ),
    "mixtral": _make(
        _decoder("mixtral", num_local_experts=8, intermediate_size=1024, sliding_window=None),
        folds_experts=True,
    ),
    "qwen2-moe": _make(
        _decoder("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=1024), folds_experts=True
    ),
    "qwen3-moe": _make(_decoder("qwen3_moe", **EXPERTS, head_dim=128), folds_experts=True),
    "olmoe": _make(
        _decoder("olmoe", num_experts=8, num_experts_per_tok=2, intermediate_size=768), folds_experts=True
    ),
    "granitemoe": _make(
        _decoder("granitemoe", num_local_experts=8, intermediate_size=768, logits_scaling=6.0), only=FULL_LOSS
    ),
    "gpt-oss": _make(
        _decoder("gpt_oss", num_local_experts=8, intermediate_size=1024, head_dim=64),
        only={"attention": ("eager",)},
    ),
    "deepseek-v3-mla": _make(
        _decoder("deepseek_v3", **LATENT), attention_modules=LATENT_NAMES, folds_experts=True
    ),
    "deepseek-v2-mla": _make(
        _decoder("deepseek_v2", **LATENT), attention_modules=LATENT_NAMES, folds_experts=True
    ),
    "glm4-moe": _make(
        _decoder(
            "glm4_moe",
            head_dim=64,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=768,
            use_qk_norm=True,
        ),
        folds_experts=True,
    ),
    "bert": _make(
        {"model_type": "bert", **ENCODER},
        objective="mlm",
        attention_modules=("query", "key", "value"),
        max_length=1024,
        only={**FULL_LOSS, **UNPACKED},
    ),
    "roberta": _make(
        {"model_type": "roberta", **ENCODER, "max_position_embeddings": 1026},
        objective="mlm",
        attention_modules=("query", "key", "value"),
        max_length=1024,
        only={**FULL_LOSS, **UNPACKED},
    ),
    "t5-gated": _make(
        {**T5, "d_ff": 2048, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        objective="seq2seq",
        attention_modules=("q", "k", "v", "o"),
        max_length=4096,
        only={"attention": ("sdpa", "eager"), **UNPACKED},
    ),
    "bart": _make(
        BART,
        objective="seq2seq",
        attention_modules=("q_proj", "k_proj", "v_proj", "out_proj"),
        max_length=1024,
        only=UNPACKED,
    ),
    "llama-dpo": _make(
        _decoder("llama", tie_word_embeddings=False), objective="dpo", max_length=32768, only=UNPACKED
    ),
    "qwen2-tied-dpo": _make(
        _decoder("qwen2", tie_word_embeddings=True), objective="dpo", max_length=32768, only=UNPACKED
    ),
    "gemma2-dpo": _make(
        _decoder("gemma2", head_dim=64, sliding_window=1024),
        objective="dpo",
        max_length=32768,
        only={"attention": EAGER_OR_FLASH, **UNPACKED},
    ),
    "cohere-dpo": _make(
        _decoder("cohere", logit_scale=0.0625),
        objective="dpo",
        max_length=32768,
        only={**FULL_LOSS, **UNPACKED},
    ),
}
