"""TRL's trainers by objective: their classes, their own arguments, and how the exported script reads rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from planner.export import _trl_script as script
from planner.setup import TrainSetup


def _sft_arguments(setup: TrainSetup) -> dict[str, Any]:
    return {
        "packing": setup.packing,
        "packing_strategy": "bfd",
        "completion_only_loss": setup.objective == "sft",
    }


def _dpo_arguments(setup: TrainSetup) -> dict[str, Any]:
    """The reference is computed before the first step and kept, as finefit's own run does."""
    return {
        "loss_type": ["sigmoid"],
        "beta": setup.dpo_beta,
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": setup.eval_batch_size or setup.micro_batch_size,
        "truncation_mode": "keep_start",
        # True would switch the adapters' dropout off
        "disable_dropout": False,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """A trainer of TRL and its config: their classes, the config's file, and how the script reads rows.

    `is_chat`: rows are conversations, which need a chat template.
    """

    what: str
    trainer: str
    config: str
    config_file: str
    rows: str
    is_chat: bool
    arguments: Callable[[TrainSetup], dict[str, Any]]


_SFT = Trainer(
    what="Supervised fine-tuning",
    trainer="SFTTrainer",
    config="SFTConfig",
    config_file="sft_config.yaml",
    rows=script.ROLES + "\n" + script.SFT_ROWS,
    is_chat=True,
    arguments=_sft_arguments,
)
TRAINERS: dict[str, Trainer] = {
    "sft": _SFT,
    "pretrain": replace(_SFT, rows=script.TEXT_ROWS, is_chat=False),
    "dpo": Trainer(
        what="Preference training",
        trainer="DPOTrainer",
        config="DPOConfig",
        config_file="dpo_config.yaml",
        rows=script.ROLES + script.PAIR_ROWS,
        is_chat=True,
        arguments=_dpo_arguments,
    ),
}
"""By objective."""
