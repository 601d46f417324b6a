"""The library versions whose behaviour is predicted: `transformers 4.48.1, peft 0.13.2, torch 2.4.1`."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

Version = tuple[int, ...]

NEWEST_KNOWN = "transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, bitsandbytes 0.50.2, torch 2.13.0"
"""The releases that finefit's own step runs on and that the formulas were derived from."""

_ENTRY = re.compile(r"([a-z][\w-]*)\s+v?(\d+(?:\.\d+)*)")


@dataclass(frozen=True, slots=True)
class Stack:
    """Versions by library; a library that the text doesn't name behaves as the newest known one."""

    versions: tuple[tuple[str, Version], ...]

    def is_before(self, library: str, *version: int) -> bool:
        """Whether `library` is older than `version`; False where the stack doesn't name it."""
        found = dict(self.versions).get(library)
        return found is not None and found < version

    @property
    def is_older(self) -> bool:
        """Whether transformers or PEFT are older than those that the formulas were derived from."""
        newest = dict(parse_stack(None).versions)
        return any(self.is_before(library, *newest[library]) for library in ("transformers", "peft"))

    @property
    def splits_experts(self) -> bool:
        """Experts are separate linears (transformers 4), not one 3-D parameter (5)."""
        return self.is_before("transformers", 5)

    @property
    def reentrant(self) -> bool:
        """Checkpoints are reentrant, the Trainer's default until transformers 5."""
        return self.is_before("transformers", 5)

    @property
    def shifts_logits(self) -> bool:
        """The loss shifts the logits and copies them; since transformers 4.50 the labels (loss/loss_utils.py)."""
        return self.is_before("transformers", 4, 50)

    @property
    def widens_first(self) -> bool:
        """The model's forward casts the logits to float32 as it makes them, until transformers 4.46
        (models/llama/modeling_llama.py).
        """
        return self.is_before("transformers", 4, 46)


OWN_LOSS_FAMILIES = ("granite", "granitemoe")
"""Families that scale their logits; where a stack shifts them, their modeling file took the loss itself and dropped
the 16-bit logits first (transformers 4.48)."""


_REPEATED_UNTIL: dict[str, Version] = {
    **dict.fromkeys(("mistral", "mixtral", "qwen2", "phi3", "starcoder2", "zamba"), (4, 48)),
    **dict.fromkeys(("jamba", "phimoe", "qwen2_moe"), (5,)),
}
"""The first transformers release in which a family's FlashAttention2 class no longer copies grouped keys and values
out to all heads (transformers/models/*/modeling_*.py of 4.45 to 4.57; the other families' classes never did)."""


def casts_back(stack: Stack, autocast: str | None) -> bool:
    """Whether embeddings and head are bfloat16 again after kbit_upcast, the norms alone float32.

    TRL's SFTTrainer did that before 0.26 when it trained 4-bit models in bfloat16 (peft_module_casting_to_bf16).
    """
    return autocast == "bfloat16" and stack.is_before("trl", 0, 26)


def repeats_groups(stack: Stack, family: str, attention: str) -> bool:
    """Whether the attention kernel is given a key and a value for each query head, where fewer are computed.

    torch's kernel was by all families before transformers 4.54 (integrations/sdpa_attention.py).
    """
    if attention == "sdpa":
        return stack.is_before("transformers", 4, 54)
    until = _REPEATED_UNTIL.get(family)
    return attention == "flash" and until is not None and stack.is_before("transformers", *until)


@functools.lru_cache(maxsize=256)
def parse_stack(text: str | None) -> Stack:
    """The stack that a setup names; the newest known where it names none.

    >>> parse_stack("transformers 4.48.1, peft 0.13.2").is_before("transformers", 4, 50)
    True
    """
    entries = _ENTRY.findall((text or NEWEST_KNOWN).lower())
    return Stack(tuple((name, tuple(int(part) for part in version.split("."))) for name, version in entries))
