"""A Llama of two layers for tests: config, random batches, a folder with weights and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.setup import TrainSetup

VOCAB = 256
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_setup(**changes: Any) -> TrainSetup:
    """A setup of the tiny model that learns in a few steps; float32 and without checkpointing unless changed."""
    values = {
        "model": CONFIG,
        "from_scratch": True,
        "weights_dtype": "float32",
        "checkpointing": "none",
        "seq_len": 32,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "schedule": "constant",
    }
    return TrainSetup(**{**values, **changes})


def random_batch(
    num_rows: int = 2, num_tokens: int = 32, seed: int = 0, untrained: int = 8
) -> dict[str, Any]:
    """Random token ids [num_rows, num_tokens]; the first `untrained` of each row give no loss."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (num_rows, num_tokens), generator=generator)
    labels = input_ids.clone()
    labels[:, :untrained] = -100
    return {"input_ids": input_ids, "labels": labels}


def count_trained(*batches: dict[str, Any]) -> int:
    """Trained tokens of all batches, as the shifted loss sees them."""
    return sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)


def save_tiny_model(folder: Path, **changes: Any) -> Path:
    """A folder with config.json, random safetensors and a byte-level chat tokenizer of 256 tokens."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**{**CONFIG, **changes})
    torch.manual_seed(7)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    letters = [chr(c) for c in range(32, 127)] + ["Ġ", "Ċ"]
    vocab = {token: i for i, token in enumerate([*special, *dict.fromkeys(letters)])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, num_rows: int = 40) -> Path:
    """Questions with answers that follow a rule, so that a tiny model can learn them."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"n {i}"},
                    {"role": "assistant", "content": f"{i} yes"},
                ]
            }
        )
        for i in range(num_rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_pairs(path: Path, num_rows: int = 24) -> Path:
    """Short is chosen, long is not."""
    lines = [
        {"prompt": f"n {n}", "chosen": f"{n} yes", "rejected": f"{n} no {'x' * (n % 5)}"}
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
