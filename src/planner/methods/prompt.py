"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): learned embeddings ahead of each row, the model itself frozen."""

from __future__ import annotations

from planner.methods import VIRTUAL_TOKENS, FindMatrices, Method, Part, PeftCall
from planner.setup import TrainSetup
from planner.specs import ModelSpec


def whole(model: ModelSpec, num_virtual_tokens: int) -> tuple[Part, ...]:
    """An embedding for each token."""
    return (Part(num_virtual_tokens, model.hidden_size),)


def peft_config(setup: TrainSetup, find_matrices: FindMatrices) -> PeftCall:
    """PEFT's PromptTuningConfig; the tokens begin as some of the vocabulary's, which the paper found better than noise."""
    return "PromptTuningConfig", {
        "num_virtual_tokens": setup.num_virtual_tokens,
        "prompt_tuning_init": "SAMPLE_VOCAB",
    }


def words(setup: TrainSetup) -> str:
    """How many tokens."""
    return f"{setup.num_virtual_tokens} virtual tokens"


METHOD = Method(
    name="prompt",
    summary="learned tokens ahead of each row (prompt tuning): the fewest parameters, slow to learn",
    whole=whole,
    lengthens=True,
    peft_config=peft_config,
    words=words,
    refusals=VIRTUAL_TOKENS,
    learning_rate=1e-3,
    learning_rate_source="PEFT's comparison of methods on MetaMathQA (Llama-3.2-3B, 200 tokens): 1e-3",
)
