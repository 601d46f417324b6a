"""The optional extras: which modules each brings, and the one line that says what to install."""

from __future__ import annotations

from collections.abc import Mapping

from planner.errors import MissingExtraError

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "safetensors",
        "gguf",
        "psutil",
        "pynvml",
        "tqdm",
        "numpy",
        "jinja2",
        "huggingface_hub",
        "tokenizers",
        "rensa",
        "py3langid",
        "stdnum",
    ),
    "export": ("trl", "deepspeed"),
    "plot": ("matplotlib", "jinja2"),
    "tensorboard": ("tensorboard",),
}
"""What `pip install 'finefit[EXTRA]'` makes importable."""

_TRAINING = ("torch", "transformers", "peft")


def require_train_extra(command: str) -> None:
    """Raise MissingExtraError where the training extra isn't installed; imports nothing."""
    from importlib.util import find_spec

    for module in _TRAINING:
        if find_spec(module) is None:
            raise MissingExtraError(command, "train", module)


def missing_extra(command: str, error: ModuleNotFoundError) -> MissingExtraError | None:
    """The extra that would bring the module that wasn't found; None where none would."""
    module = (error.name or "").partition(".")[0]
    extra = next((name for name, modules in EXTRAS.items() if module in modules), None)
    return None if extra is None else MissingExtraError(command, extra, module)
