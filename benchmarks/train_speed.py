"""CPU-seconds per optimizer step: finefit's run loop beside Hugging Face's Trainer, the same LoRA fine-tune.

    python benchmarks/train_speed.py [--steps 4] [--repetitions 3] [--report reports/speed.md]

Both train SmolLM2-135M-Instruct in bfloat16 on the same blocks of 4 x 512 tokens (all tokens trained), LoRA of rank 16
on all linears in bfloat16, fused AdamW, gradients clipped at 1, the loss read at each step; no checkpointing, no
evaluation, nothing saved. `finefit` takes the loss in chunks of 512 tokens, which gives the same loss and gradients;
`finefit-all-logits` holds all logits as Trainer does (`loss: full`): the same operators, so the same time.
Every measurement is a child process of its own and the programs take turns. CPU-seconds (user + system, getrusage)
are compared because wall time on a shared machine measures its neighbours, and one thread computes because several
that wait for each other count their waiting as work. The first step of each child is left out.
The last line is one JSON object; exit code 3 when finefit needs more than Trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
DATA = Path(__file__).parents[1] / "data" / "chatterbot-en.jsonl"
NUM_ROWS, SEQ_LEN = 4, 512
LEARNING_RATE = 2e-4
ARMS = ("trainer", "finefit", "finefit-all-logits")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One child's figures; `cpu_s` per optimizer step, without the first one."""

    arm: str
    cpu_s: list[float]
    wall_s: list[float]
    losses: list[float]
    peak_rss_bytes: int


def main() -> None:
    options = parse_arguments()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.steps + 1)))
        return
    results = [run_child(arm, options.steps, options.threads) for arm in in_turns(options.repetitions)]
    summary = summarise(results)
    table = format_table(summary)
    print(table)
    if options.report:
        options.report.write_text(format_report(table, summary, options), encoding="utf-8")
        raw = options.report.with_suffix(".json")
        raw.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    sys.exit(0 if summary["ratio"] <= 1 else 3)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4, help="measured optimizer steps per child")
    parser.add_argument("--repetitions", type=int, default=3, help="children per program")
    parser.add_argument("--threads", type=int, default=1, help="threads of each child")
    parser.add_argument(
        "--report", type=Path, help="write the table as Markdown, and the raw figures as .json beside it"
    )
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_turns(num_repetitions: int) -> list[str]:
    """Forwards, then backwards, so that a machine that slows down slows down all."""
    return [arm for n in range(num_repetitions) for arm in (ARMS if n % 2 == 0 else reversed(ARMS))]


def run_child(arm: str, num_steps: int, num_threads: int) -> Result:
    command = [sys.executable, __file__, "--child", arm, "--steps", str(num_steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "passive"}
    print(f"{arm} …", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return Result(arm=arm, **json.loads(done.stdout.splitlines()[-1]))


def setup_of(loss: str) -> Any:
    from planner.setup import TrainSetup

    return TrainSetup(
        model=MODEL,
        data=str(DATA),
        eval_fraction=0.0,
        method="lora",
        rank=16,
        alpha=32,
        adapter_dtype="bfloat16",
        weights_dtype="bfloat16",
        optimizer="adamw-fused",
        micro_batch_size=NUM_ROWS,
        seq_len=SEQ_LEN,
        checkpointing="none",
        loss=loss,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup_steps=0,
        epochs=1000,
    )


def blocks(num_steps: int) -> list[list[int]]:
    """The data's documents one after the other, cut into rows of SEQ_LEN tokens, as many as the steps need."""
    from bench.token_cache import tokenize_file
    from bench.weights import load_tokenizer

    examples = tokenize_file(DATA, load_tokenizer(setup_of("full")), seq_len=SEQ_LEN).examples
    tokens = [int(token) for example in examples for token in example.input_ids]
    needed = num_steps * NUM_ROWS * SEQ_LEN
    tokens = (tokens * -(-needed // len(tokens)))[:needed]
    return [tokens[at : at + SEQ_LEN] for at in range(0, needed, SEQ_LEN)]


class Clock:
    """Marks of CPU and wall time at the end of each step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        import time

        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.marks.append((usage.ru_utime + usage.ru_stime, time.perf_counter()))

    def figures(self, losses: list[float]) -> dict[str, Any]:
        """What a child prints; the first step ends at the first mark."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        return {
            "cpu_s": [after[0] - before[0] for before, after in pairs],
            "wall_s": [after[1] - before[1] for before, after in pairs],
            "losses": losses,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def finefit_child(loss: str, num_steps: int) -> dict[str, Any]:
    import numpy as np

    from bench import run as run_module
    from bench.build import build_model
    from bench.data import Example
    from bench.quiet import quiet_libraries
    from bench.rundata import run_data
    from bench.runfolder import RunFolder
    from bench.signals import StopFlag
    from bench.weights import load_tokenizer, local_model
    from planner.planfile import PlanFile

    quiet_libraries()
    clock = Clock()

    class TimedRun(run_module.Run):
        def _take_step(self) -> None:
            super()._take_step()
            clock.mark()

        def _evaluate_if_due(self) -> None:
            """Nothing: Trainer doesn't either."""

    setup = setup_of(loss).with_(max_steps=num_steps)
    rows = [np.array(block, dtype=np.int32) for block in blocks(num_steps)]
    # The first token of a row has no prediction: Trainer's loss leaves it out by shifting the labels.
    labels = [np.concatenate(([-100], row[1:])).astype(np.int32) for row in rows]
    examples = [
        Example(input_ids=r, labels=lab, group=str(n))
        for n, (r, lab) in enumerate(zip(rows, labels, strict=True))
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        RunFolder(Path(folder) / "run", PlanFile(setup=setup)) as place,
    ):
        model = build_model(setup, weights=local_model(MODEL))
        tokenizer = load_tokenizer(setup)
        data = run_data(setup, examples, pad_id=tokenizer.pad_token_id)
        timed = TimedRun(
            place, data, model, tokenizer, stop=StopFlag(), progress=False, save_every_steps=num_steps + 1
        )
        timed.execute()
        losses = [entry["loss"] for entry in timed.log.read()]
    return clock.figures(losses)


def trainer_child(num_steps: int) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    from bench.quiet import quiet_libraries
    from bench.weights import local_model

    quiet_libraries()
    clock = Clock()

    class Marker(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **options: Any) -> None:
            clock.mark()

    model = transformers.AutoModelForCausalLM.from_pretrained(local_model(MODEL), dtype=torch.bfloat16)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    rows = [{"input_ids": block, "labels": block} for block in blocks(num_steps)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=NUM_ROWS,
            max_steps=num_steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        collator = transformers.default_data_collator
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[Marker()]
        )
        trainer.train()
    return clock.figures([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


CHILDREN: dict[str, Callable[[int], dict[str, Any]]] = {
    "trainer": trainer_child,
    "finefit": lambda num_steps: finefit_child("chunked", num_steps),
    "finefit-all-logits": lambda num_steps: finefit_child("full", num_steps),
}


def summarise(results: list[Result]) -> dict[str, Any]:
    """Medians over all steps of all children, the children's own medians as spread, and finefit over Trainer."""
    arms = {}
    for arm in ARMS:
        own = [r for r in results if r.arm == arm]
        medians = [statistics.median(r.cpu_s) for r in own]
        arms[arm] = {
            "cpu_s_per_step": statistics.median(s for r in own for s in r.cpu_s),
            "low_cpu_s": min(medians),
            "high_cpu_s": max(medians),
            "wall_s_per_step": statistics.median(s for r in own for s in r.wall_s),
            "peak_rss_bytes": max(r.peak_rss_bytes for r in own),
            "mean_loss": statistics.fmean(own[0].losses),
            "num_children": len(own),
        }
    ratio = arms["finefit"]["cpu_s_per_step"] / arms["trainer"]["cpu_s_per_step"]
    return {"ratio": ratio, "arms": arms, "raw": [vars(r) for r in results]}


def format_table(summary: dict[str, Any]) -> str:
    lines = [
        "| program | CPU-s per step | lowest and highest child | peak RSS, MB | mean loss |",
        "|---|---|---|---|---|",
    ]
    for arm, figures in summary["arms"].items():
        lines.append(
            f"| {arm} | {figures['cpu_s_per_step']:.2f} | {figures['low_cpu_s']:.2f} – {figures['high_cpu_s']:.2f} "
            f"| {figures['peak_rss_bytes'] / 1e6:.0f} | {figures['mean_loss']:.3f} |"
        )
    return "\n".join(lines)


def format_report(table: str, summary: dict[str, Any], options: argparse.Namespace) -> str:
    packages = ("torch", "transformers", "peft", "accelerate")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return f"""# Speed of training on the CPU

Made by `python benchmarks/train_speed.py --steps {options.steps} --repetitions {options.repetitions} --report …`.

{table}

finefit / Trainer, CPU-seconds per step: **{summary["ratio"]:.3f}** (must reach: at most 1).

Both train {__doc__.partition("Both train ")[2].strip()}

Losses are means over the steps of one child; the programs shuffle the blocks differently, so they are close, not equal.

{versions}; Python {platform.python_version()}; {os.cpu_count()} CPUs, {platform.machine()};
{options.repetitions} children per program, {options.steps} steps each after one warm-up step, {options.threads} thread(s).
"""


if __name__ == "__main__":
    main()
