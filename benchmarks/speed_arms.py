"""The programs of benchmarks/train_speed.py: each trains one pass over a Load in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_data import LEARNING_RATE, Clock, Load, held_out_loss

KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_TOP_PAD_": "67108864",
}
"""glibc's variables for what finefit asks of malloc by itself (bench/host_memory.py)."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One program with its settings; `options` are its own arguments."""

    program: str
    what: str
    weights: str = "bfloat16"
    attention: str = "sdpa"
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def _finefit(what: str, **options: Any) -> Arm:
    return Arm(program="finefit", what=what, options=options)


def _trainer(what: str, attention: str = "sdpa", **options: Any) -> Arm:
    return Arm(program="trainer", what=what, attention=attention, options=options, environment=KEPT_MEMORY)


def _trl(what: str, attention: str = "sdpa", **options: Any) -> Arm:
    options = {**_PLAIN_TRL, **options}
    return Arm(program="trl", what=what, attention=attention, options=options, environment=KEPT_MEMORY)


_PLAIN_TRL = {"bf16": False, "gradient_checkpointing": False}
_BY_8 = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
"""32 rows at once need 11 GB and more with all logits in float32."""
_GROUPED = {"train_sampling_strategy": "group_by_length", **_BY_8}
_AUTOCAST = {"bf16": True, **_BY_8}

NATURAL: dict[str, Arm] = {
    "finefit": _finefit("joined rows, fused kernels, chunked loss", padding_free=True, kernels="fused"),
    "trainer-tuned": _trainer("bf16 weights, 4 x 8 rows grouped by length, malloc tuned", **_GROUPED),
    "trl-tuned": _trl(
        "bf16 weights, no checkpointing, 4 x 8 rows grouped by length, malloc tuned", **_GROUPED
    ),
    "trl-packed": _trl(
        "bf16 weights, no checkpointing, packed into rows of 512, malloc tuned",
        packing=True,
        max_length=512,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    ),
    "trainer-documented": Arm(
        program="trainer",
        what="float32 weights, bf16 autocast, 4 x 8 rows",
        weights="float32",
        options=_AUTOCAST,
    ),
    "trl-defaults": Arm(
        program="trl",
        what="its defaults: float32 weights, bf16 autocast, checkpointing",
        weights="float32",
        options=_BY_8,
    ),
}
"""Rows of their own lengths."""

BLOCKS: dict[str, Arm] = {
    "finefit": NATURAL["finefit"],
    "trainer-tuned": _trainer("bf16 weights, malloc tuned"),
    "trl-tuned": _trl("bf16 weights, no checkpointing, malloc tuned"),
    "trainer-eager": _trainer("bf16 weights, eager attention, malloc tuned", "eager"),
}
"""Full rows."""

VARIANTS: dict[str, Arm] = {
    "finefit-plain-kernels": _finefit("joined rows, plain kernels, chunked loss", padding_free=True),
    "finefit-padded": _finefit(
        "4 x 8 padded rows, plain kernels, chunked loss", micro_batch_size=8, grad_accum_steps=4
    ),
    "finefit-all-logits": _finefit(
        "joined rows, fused kernels, all logits", padding_free=True, kernels="fused", loss="full"
    ),
    "trainer-eager": _trainer("as tuned, with eager attention", "eager", **_GROUPED),
    "trl-eager": _trl("as tuned, with eager attention", "eager", **_GROUPED),
    "trainer-random": _trainer("bf16 weights, 4 x 8 rows in random order, malloc tuned", **_BY_8),
    "trainer-malloc-untouched": Arm(
        program="trainer", what="bf16 weights, grouped, malloc as it is", options=_GROUPED
    ),
    "trainer-flattened": _trainer(
        "bf16 weights, 4 x 8 rows joined by DataCollatorWithFlattening", flattens=True, **_BY_8
    ),
    "trainer-flattened-eager": _trainer("the same with eager attention", "eager", flattens=True, **_BY_8),
    "trl-packed-eager": _trl(
        "packed into rows of 512, eager attention",
        "eager",
        packing=True,
        max_length=512,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    ),
    "trl-random": _trl("bf16 weights, 4 x 8 rows in random order, malloc tuned", **_BY_8),
    "trl-malloc-untouched": Arm(
        program="trl", what="bf16 weights, grouped, malloc as it is", options={**_PLAIN_TRL, **_GROUPED}
    ),
    "trl-padding-free": _trl("4 x 8 rows, padding_free", padding_free=True, max_length=None, **_BY_8),
    "trl-packed-1024": _trl(
        "packed into rows of 1024",
        packing=True,
        max_length=1024,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    ),
    "trl-packed-2048": _trl(
        "packed into rows of 2048", packing=True, max_length=2048, per_device_train_batch_size=1
    ),
    "trainer-compiled": _trainer("bf16 weights, grouped, torch_compile", torch_compile=True, **_GROUPED),
}
"""What else was tried on rows of their own lengths."""

CASES = {"natural": NATURAL, "blocks": BLOCKS, "variants": VARIANTS}


def run_arm(arm: Arm, load: Load, clock: Clock) -> dict[str, Any]:
    """Train; figures of the training, then the loss of the held-out rows."""
    from bench.quiet import quiet_libraries

    quiet_libraries()
    model = PROGRAMS[arm.program](arm, load, clock)
    batches_per_step = arm.options.get("gradient_accumulation_steps", 1)
    return {**clock.figures(batches_per_step), "held_out_loss": held_out_loss(model, load.held_out)}


def finefit(arm: Arm, load: Load, clock: Clock) -> Any:
    """finefit's own run loop, without its evaluations, and its checkpoints after the end."""
    from bench import run as run_module
    from bench.build import build_model
    from bench.host_memory import keep_freed_memory
    from bench.run_options import RunOptions
    from bench.rundata import run_data
    from bench.runfolder import RunFolder
    from bench.signals import StopFlag
    from bench.weights import load_tokenizer, local_model
    from planner.planfile import PlanFile

    keep_freed_memory()

    class TimedRun(run_module.Run):
        def _take_step(self) -> None:
            super()._take_step()
            clock.batch_tokens.append(self.state.num_tokens - sum(clock.batch_tokens))
            clock.mark()
            self.num_steps = self.state.step if clock.is_over else self.num_steps

        def _record(self, values: Any) -> None:
            super()._record(values)
            clock.losses.append(values["loss"])

        def _examine_if_due(self) -> None:
            """Nothing: the others don't either."""

    setup = _setup(arm, load)
    with (
        tempfile.TemporaryDirectory() as folder,
        RunFolder(Path(folder) / "run", PlanFile(setup=setup)) as place,
    ):
        model = build_model(setup, weights=local_model(load.model), device=load.device)
        tokenizer = load_tokenizer(setup)
        data = run_data(setup, load.train, pad_id=tokenizer.pad_token_id)
        TimedRun(
            place,
            data,
            model,
            tokenizer,
            stop=StopFlag(),
            options=RunOptions(device=load.device, progress=False, save_every_steps=load.num_steps + 1),
        ).execute()
    return model


def _setup(arm: Arm, load: Load) -> Any:
    from planner.setup import TrainSetup

    values = {
        "model": load.model,
        "eval_fraction": 0.0,
        "adapter_dtype": "bfloat16",
        "optimizer": "adamw-fused",
        "micro_batch_size": load.rows_per_step,
        "seq_len": load.seq_len,
        "checkpointing": "none",
        "loss": "chunked",
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
        "warmup_steps": 0,
        "max_steps": load.num_steps,
    }
    return TrainSetup(**{**values, **arm.options})


def _lora_model(arm: Arm, load: Load) -> Any:
    """The same adapters for all, in the weights' dtype; Hugging Face's trainers are given the wrapped model."""
    import peft
    import torch
    import transformers

    from bench.weights import local_model

    torch.manual_seed(42)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        local_model(load.model), dtype=getattr(torch, arm.weights), attn_implementation=arm.attention
    )
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def _arguments(folder: str, load: Load, options: Mapping[str, Any]) -> dict[str, Any]:
    values = {
        "output_dir": folder,
        "per_device_train_batch_size": load.rows_per_step,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": load.device == "cpu",
    }
    return {**values, **options}


def _marker(clock: Clock) -> Any:
    import transformers

    class Marker(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> Any:
            clock.mark()
            control.should_training_stop = control.should_training_stop or clock.is_over
            return control

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **options: Any) -> None:
            clock.losses += [float(logs["loss"])] if "loss" in logs else []

    return Marker()


def _counting(collator: Callable[[Any], Any], clock: Clock) -> Callable[[Any], Any]:
    """The collator, which also counts the real tokens that it is given."""

    def collate(rows: Any) -> Any:
        clock.batch_tokens.append(sum(len(row["input_ids"]) for row in rows))
        return collator(rows)

    return collate


def _dataset(load: Load) -> Any:
    import datasets

    return datasets.Dataset.from_dict(
        {
            "input_ids": [example.input_ids.tolist() for example in load.train],
            "labels": [example.labels.tolist() for example in load.train],
        }
    )


def trainer(arm: Arm, load: Load, clock: Clock) -> Any:
    """Hugging Face's Trainer."""
    import transformers

    from bench.weights import load_tokenizer
    from planner.setup import TrainSetup

    tokenizer = load_tokenizer(TrainSetup(model=load.model))
    options = dict(arm.options)
    collator: Any = transformers.DataCollatorForSeq2Seq(tokenizer)
    if options.pop("flattens", False):
        collator = transformers.DataCollatorWithFlattening()
    model = _lora_model(arm, load)
    with tempfile.TemporaryDirectory() as folder:
        run = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**_arguments(folder, load, options)),
            train_dataset=_dataset(load),
            data_collator=_counting(collator, clock),
            callbacks=[_marker(clock)],
        )
        run.train()
    return model


def trl(arm: Arm, load: Load, clock: Clock) -> Any:
    """TRL's SFTTrainer, given the same tokens and labels."""
    from trl import SFTConfig, SFTTrainer

    from bench.weights import load_tokenizer
    from planner.setup import TrainSetup

    model = _lora_model(arm, load)
    with tempfile.TemporaryDirectory() as folder:
        run = SFTTrainer(
            model=model,
            args=SFTConfig(**_arguments(folder, load, arm.options)),
            train_dataset=_dataset(load),
            processing_class=load_tokenizer(TrainSetup(model=load.model)),
            callbacks=[_marker(clock)],
        )
        run.data_collator = _counting(run.data_collator, clock)
        run.train()
    return model


PROGRAMS: dict[str, Callable[[Arm, Load, Clock], Any]] = {
    "finefit": finefit,
    "trainer": trainer,
    "trl": trl,
}
