"""One or more small configurations of every family: each switch on and off, at least a period of each kind of layer."""

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 56}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 48,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
DELTA = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
GLM_MOE = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 24}
MAMBA = {"shared_intermediate_size": 40, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 10}
LLAMA4 = {"intermediate_size_mlp": 130, "num_local_experts": 4, "head_dim": 16}
PER_LAYER = {"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 300}
GEMMA3N = {
    **PER_LAYER,
    "num_hidden_layers": 10,
    "num_kv_shared_layers": 4,
    "laurel_rank": 6,
    "altup_num_inputs": 3,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
}
GEMMA4_MOE = {
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "global_head_dim": 48,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300}
T5 = {"d_model": 64, "num_layers": 3, "num_heads": 4, "d_kv": 24, "d_ff": 99, "vocab_size": 300}
BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 99,
    "decoder_ffn_dim": 77,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "vocab_size": 300,
    "max_position_embeddings": 55,
}
DISTILBERT = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 99, "vocab_size": 300}
_OLD_NAMES = ("intermediate_size", "num_key_value_heads")


def _decoder(model_type, **changes):
    return {**BASE, "model_type": model_type, **changes}


def _without(model_type, *keys, **changes):
    kept = {key: value for key, value in BASE.items() if key not in keys}
    return {**kept, "model_type": model_type, **changes}


LLAMA_LIKE = [
    _decoder("llama"),
    _decoder("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=24),
    _decoder("mistral"),
    _decoder("mistral", sliding_window=None),
    _decoder("ministral3", head_dim=16),
    _decoder("ministral", head_dim=16, layer_types=["sliding_attention"] * 4 + ["full_attention"] * 4),
    _decoder("smollm3"),
    _decoder("seed_oss", head_dim=32),
    _decoder("olmo"),
    _decoder("olmo2"),
    _decoder("olmo3"),
    _decoder("olmo3", num_hidden_layers=5),
    _decoder("granite", tie_word_embeddings=True),
    _decoder("granite", attention_bias=True, mlp_bias=True),
    _decoder("internlm3", head_dim=32),
    _decoder("exaone4"),
    _decoder("stablelm"),
    _decoder("stablelm", use_qkv_bias=True, use_parallel_residual=True),
    _decoder("stablelm", qk_layernorm=True),
    _decoder("cohere"),
    _decoder("cohere", use_qk_norm=True, attention_bias=True),
    _decoder("cohere2"),
    _decoder("starcoder2"),
    _decoder("starcoder2", use_bias=False, sliding_window=128),
]
QWEN = [
    _decoder("qwen2"),
    _decoder("qwen2", use_sliding_window=True, max_window_layers=3, sliding_window=99),
    _decoder("qwen3"),
    _decoder("qwen3", attention_bias=True, head_dim=20),
    _decoder("qwen2_moe", **SHARED),
    _decoder("qwen2_moe", **SHARED, mlp_only_layers=[1, 3], decoder_sparse_step=2, qkv_bias=False),
    _decoder("qwen2_moe", **SHARED, use_sliding_window=True, max_window_layers=5, sliding_window=99),
    _decoder("qwen3_moe", **EXPERTS, head_dim=16),
    _decoder("qwen3_moe", **EXPERTS, head_dim=20, mlp_only_layers=[0], attention_bias=True),
    _decoder("qwen3_next", **SHARED, **DELTA),
    _decoder("qwen3_next", **SHARED, **DELTA, head_dim=24, mlp_only_layers=[2]),
    _decoder("qwen3_5_text", **DELTA),
    _decoder("qwen3_5_moe_text", **SHARED, **DELTA),
]
EXPERT_MIXTURES = [
    _decoder("mixtral", num_local_experts=4),
    _decoder("phimoe", num_local_experts=4, attention_bias=True, lm_head_bias=True),
    _decoder("phimoe", num_local_experts=4),
    _decoder("olmoe", num_experts=4, num_experts_per_tok=2),
    _decoder("granitemoe", num_local_experts=4),
    _decoder("granitemoehybrid", **MAMBA, num_local_experts=4, layer_types=["mamba", "attention"] * 4),
    _decoder("granitemoehybrid", **MAMBA, num_local_experts=0, layer_types=["attention"] * 8),
    _decoder("deepseek_v2", **LATENT, first_k_dense_replace=1),
    _decoder("deepseek_v2", **{**LATENT, "q_lora_rank": None}, first_k_dense_replace=2, attention_bias=True),
    _decoder("deepseek_v3", **LATENT),
    _decoder("deepseek_v3", **{**LATENT, "q_lora_rank": None}, first_k_dense_replace=1, attention_bias=True),
    _decoder("glm4_moe", **GLM_MOE, use_qk_norm=True, attention_bias=True),
    _decoder("glm4_moe", **GLM_MOE, first_k_dense_replace=3, n_shared_experts=2),
    _decoder("gpt_oss", num_local_experts=4, head_dim=24),
    _decoder("llama4_text", **LLAMA4),
    _decoder("llama4_text", **LLAMA4, interleave_moe_layer_step=2, attention_bias=True),
]
GEMMA = [
    _decoder("gemma"),
    _decoder("gemma2"),
    _decoder("gemma3_text"),
    _decoder("gemma3_text", num_hidden_layers=13, head_dim=16),
    _decoder("gemma3n_text", **GEMMA3N),
    _decoder("gemma4_text"),
    _decoder(
        "gemma4_text", **PER_LAYER, num_hidden_layers=12, num_kv_shared_layers=6, use_double_wide_mlp=True
    ),
    _decoder("gemma4_text", **GEMMA4_MOE),
]
FUSED = [
    _decoder("phi"),
    _decoder("phi", qk_layernorm=True),
    _decoder("phi3"),
    _decoder("phi3", sliding_window=44, tie_word_embeddings=True),
    _decoder("glm", head_dim=16),
    _decoder("glm", head_dim=24, attention_bias=False),
    _decoder("glm4", head_dim=16),
]
GPT2_GENERATION = [
    {"model_type": "gpt2", **GPT2, "n_positions": 77},
    {"model_type": "gpt2", **GPT2, "n_inner": 99},
    {"model_type": "gpt_bigcode", **GPT2, "n_positions": 77},
    {"model_type": "gpt_bigcode", **GPT2, "multi_query": False},
    {"model_type": "gptj", **GPT2, "rotary_dim": 8},
    _without("gpt_neox", "num_key_value_heads"),
    _without("gpt_neox", "num_key_value_heads", attention_bias=False, tie_word_embeddings=True),
    {"model_type": "bloom", "hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300},
    _without("falcon", *_OLD_NAMES),
    _without("falcon", *_OLD_NAMES, new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=70),
    _without("falcon", *_OLD_NAMES, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    _without("falcon", *_OLD_NAMES, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    _without("opt", *_OLD_NAMES, ffn_dim=99),
    _without("opt", *_OLD_NAMES, ffn_dim=99, do_layer_norm_before=False, word_embed_proj_dim=48),
    _without("opt", *_OLD_NAMES, ffn_dim=99, enable_bias=False),
]
ENCODERS = [
    _without("bert", "num_key_value_heads", type_vocab_size=3),
    _without("roberta", "num_key_value_heads"),
    _without("xlm-roberta", "num_key_value_heads"),
    {"model_type": "distilbert", **DISTILBERT},
    _without("deberta-v2", "num_key_value_heads"),
    _without(
        "deberta-v2",
        "num_key_value_heads",
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_buckets=32,
        max_relative_positions=-1,
    ),
    _without(
        "deberta-v2",
        "num_key_value_heads",
        relative_attention=True,
        pos_att_type="p2c|c2p",
        share_att_key=False,
    ),
    _without(
        "deberta-v2", "num_key_value_heads", relative_attention=True, pos_att_type="c2p", share_att_key=False
    ),
]
ENCODER_DECODERS = [
    {"model_type": "t5", **T5},
    {"model_type": "t5", **T5, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"},
    {"model_type": "mt5", **T5, "feed_forward_proj": "gated-gelu"},
    {"model_type": "bart", **BART},
]
CONFIGS = [
    *LLAMA_LIKE,
    *QWEN,
    *EXPERT_MIXTURES,
    *GEMMA,
    *FUSED,
    *GPT2_GENERATION,
    *ENCODERS,
    *ENCODER_DECODERS,
]


def label(config):
    """The model_type and what this configuration of it changes."""
    known = (
        BASE,
        EXPERTS,
        SHARED,
        LATENT,
        DELTA,
        GLM_MOE,
        MAMBA,
        LLAMA4,
        GEMMA3N,
        GEMMA4_MOE,
        GPT2,
        T5,
        BART,
        DISTILBERT,
    )
    shared = {key for table in known for key in table} | {"model_type"}
    changes = [f"{key}={value}" for key, value in config.items() if key not in shared]
    return "-".join([config["model_type"], *changes]).replace(" ", "")[:90]
