"""Keep libraries' chatter out of the output: stdout is for data, and stderr for what the user must know."""

from __future__ import annotations

import logging
import warnings

_HARMLESS_WARNINGS = (
    "Paged optimizers are not supported on CPU",
    "`is_gradient_checkpointing` is deprecated",
    "`torch.jit.script",
    r"`torch\.distributed\.\w+` is deprecated",
)
_HARMLESS_LOGS = {
    "DeepSpeed": "Setting accelerator to CPU",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""Words about faster paths that this machine doesn't have, and among libraries; DeepSpeed's go to stdout."""


def quiet_libraries() -> None:
    """Drop known harmless words of the training stack and its bars; call it before the model is built."""
    from transformers.utils.logging import disable_progress_bar

    for message in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, words in _HARMLESS_LOGS.items():
        logging.getLogger(name).addFilter(_Without(words))
    disable_progress_bar()


class _Without(logging.Filter):
    """Lets all records through but those that hold some words; equal ones are installed once."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        return self.words not in record.getMessage()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Without) and other.words == self.words

    def __hash__(self) -> int:
        return hash(self.words)
