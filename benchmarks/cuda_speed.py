"""Real tokens per second of LoRA on a GPU: finefit's run loop beside Hugging Face's Trainer and TRL's SFTTrainer.

    python benchmarks/cuda_speed.py --prepare DATA         writes rows and tokenizer files for a machine without them
    python benchmarks/cuda_speed.py --rows DATA --report reports/speed-cuda.md
    python benchmarks/cuda_speed.py --rows DATA --device cpu --tiny --steps 3 --discard 1      to see that all arms run

The model has the shape of Llama 3.2 1B and random weights, written once: figures of speed and memory don't depend on what
they are. Each measurement is a child process of its own, one after the other. Every figure is saved as soon as it is there;
what the budget doesn't reach is reported as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cuda_report import format_report, summarise
from speed_arms import Arm, run_arm
from speed_children import run_child, turns
from speed_data import LONGEST, MODEL, Clock, Load, full_rows, real_rows

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ROWS_PER_STEP = {"natural": 128, "blocks": 8}
BLOCK = 1024
STARTED = time.monotonic()
PATIENCE_S, CHILD_S = 8.0, 90.0
"""Longest measurement of one program, and of its whole process."""


def _finefit(what: str, **options: Any) -> Arm:
    return Arm(program="finefit", what=what, options=options)


def _tuned(program: str, what: str, **options: Any) -> Arm:
    own = {} if program == "trainer" else {"bf16": False, "gradient_checkpointing": False}
    return Arm(program=program, what=what, options={**own, **options})


_BY_64 = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 2}
"""The 128 longest rows at once, each as long as the longest, take 104 GiB with all logits; 64 take 52."""
_GROUPED = {"train_sampling_strategy": "group_by_length", **_BY_64}
_LIGER = {"use_liger_kernel": True}

NATURAL = {
    "finefit": _finefit("joined rows, fused kernels, chunked loss", padding_free=True, kernels="fused"),
    "trainer-liger": _tuned(
        "trainer", "bf16 weights, 2 x 64 rows grouped by length, sdpa, Liger", **_GROUPED, **_LIGER
    ),
    "finefit-liger": _finefit(
        "joined rows, Liger's kernels, chunked loss", padding_free=True, kernels="liger"
    ),
    "trl-packed": _tuned(
        "trl",
        "bf16 weights, no checkpointing, packed into rows of 1024, 2 x 4 of them",
        packing=True,
        max_length=1024,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    ),
    "trainer-tuned": _tuned("trainer", "bf16 weights, 2 x 64 rows grouped by length, sdpa", **_GROUPED),
    "trl-tuned": _tuned("trl", "bf16 weights, no checkpointing, 2 x 64 rows grouped by length", **_GROUPED),
    "trl-liger": _tuned("trl", "the same with Liger", **_GROUPED, **_LIGER),
    "finefit-plain": _finefit(
        "2 x 64 padded rows, plain kernels, all logits", micro_batch_size=64, grad_accum_steps=2, loss="full"
    ),
    "trl-defaults": Arm(
        program="trl",
        what="its defaults (float32 weights, bf16 autocast, checkpointing), 8 rows at a time",
        weights="float32",
        options={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 16},
    ),
}
BLOCKS = {
    "finefit": NATURAL["finefit"],
    "trainer-liger": _tuned("trainer", "bf16 weights, sdpa, Liger", **_LIGER),
    "finefit-liger": NATURAL["finefit-liger"],
    "trainer-tuned": _tuned("trainer", "bf16 weights, sdpa"),
    "trl-tuned": _tuned("trl", "bf16 weights, no checkpointing"),
    "trl-liger": _tuned("trl", "bf16 weights, no checkpointing, Liger", **_LIGER),
    "finefit-plain": _finefit("rows as they are, plain kernels, all logits", loss="full"),
}
CASES = {"natural": NATURAL, "blocks": BLOCKS}


def main() -> None:
    options = parse_arguments()
    if options.prepare:
        prepare(options.prepare)
    elif options.child:
        print(json.dumps(measure(*options.child, options)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure_all(make_model(Path(folder), options), options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--prepare", type=Path, metavar="DATA", help="write the rows and the tokenizer into this folder"
    )
    parser.add_argument("--rows", type=Path, metavar="DATA", help="what --prepare wrote")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--only", nargs="+", help="programs to run (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps per child")
    parser.add_argument("--discard", type=int, default=4, help="the first of them, which don't count")
    parser.add_argument("--repetitions", type=int, default=1, help="children per program")
    parser.add_argument(
        "--budget-s", type=float, default=235.0, help="no child is started that may end later"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two narrow layers")
    parser.add_argument(
        "--report", type=Path, help="write the report as Markdown, and the raw figures as .json"
    )
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.prepare and not options.rows:
        parser.error("--rows DATA is needed; --prepare DATA writes it")
    return options


def prepare(folder: Path) -> None:
    """The tokenized rows and the tokenizer's files."""
    import numpy as np

    from bench.weights import local_model

    folder.mkdir(parents=True, exist_ok=True)
    parts = dict(zip(("train", "held_out"), real_rows(), strict=True))
    arrays = {}
    for name, rows in parts.items():
        arrays[f"{name}_lengths"] = np.array([row.num_tokens for row in rows])
        arrays[f"{name}_ids"] = np.concatenate([row.input_ids for row in rows])
        arrays[f"{name}_labels"] = np.concatenate([row.labels for row in rows])
    np.savez_compressed(folder / "rows.npz", **arrays)
    for file in TOKENIZER_FILES:
        shutil.copy(local_model(MODEL) / file, folder / file)


def read_rows(folder: Path) -> tuple[list[Any], list[Any]]:
    """What `prepare` wrote: rows to train on, and those that are held out."""
    import numpy as np

    from bench.data import Example

    found = []
    with np.load(folder / "rows.npz") as arrays:
        for name in ("train", "held_out"):
            borders = np.cumsum(arrays[f"{name}_lengths"])[:-1]
            parts = zip(
                *(np.split(arrays[f"{name}_{kind}"], borders) for kind in ("ids", "labels")), strict=True
            )
            found.append(
                [Example(input_ids=ids, labels=labels, group=str(n)) for n, (ids, labels) in enumerate(parts)]
            )
    return found[0], found[1]


def make_model(folder: Path, options: argparse.Namespace) -> Path:
    """A folder with the config, random bfloat16 weights and the tokenizer."""
    import torch
    import transformers

    for file in TOKENIZER_FILES:
        shutil.copy(options.rows / file, folder / file)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab_size = len(tokenizer["model"]["vocab"])
    config = transformers.AutoConfig.for_model(
        **{**SHAPE, **(TINY if options.tiny else {}), "vocab_size": vocab_size}
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def measure(case: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One program's figures, in this process."""
    clock = Clock(
        started=float(os.environ["SPEED_STARTED"]),
        num_discarded=options.discard,
        device=options.device,
        patience_s=PATIENCE_S,
    )
    return run_arm(CASES[case][name], load_of(case, options), clock)


def load_of(case: str, options: argparse.Namespace) -> Load:
    """The real rows as often as it takes, or full ones made of them."""
    train, held_out = read_rows(options.rows)
    rows_per_step = ROWS_PER_STEP[case]
    needed = options.steps * rows_per_step
    if case == "blocks":
        rows = full_rows(train, needed, BLOCK)
    else:
        rows = (train * -(-needed // len(train)))[:needed]
    return Load(
        train=rows,
        held_out=held_out[:16],
        num_steps=options.steps,
        rows_per_step=rows_per_step,
        model=str(options.model),
        device=options.device,
        seq_len=BLOCK if case == "blocks" else LONGEST,
    )


def measure_all(model: Path, options: argparse.Namespace) -> None:
    """Every program of every case, the cases in turn; the report as far as it has come after each."""
    until = STARTED + options.budget_s
    about_all = {"steps": options.steps, "discarded": options.discard, "tiny": options.tiny}
    results: dict[str, list[dict[str, Any]]] = {case: [] for case in options.case}
    for case, name in _order(options):
        left = until - time.monotonic()
        about = {"arm": name, "what": CASES[case][name].what}
        if left < _usual_s(results):
            results[case].append({**about, "failure": "not run: the time was over"})
            continue
        found = run_child(
            __file__,
            case,
            name,
            _passed_on(model, options),
            about=about,
            environment={} if options.device == "cuda" else {"OMP_NUM_THREADS": "1"},
            say=lambda found: f"{found['tokens'] / found['wall_s']:.0f} tokens/s",
            timeout_s=min(left, CHILD_S),
        )
        results[case].append(found)
        _write(summarise(results, about_all), options.report)
    summary = summarise(results, about_all)
    _write(summary, options.report)
    print(format_report(summary))


def _order(options: argparse.Namespace) -> list[tuple[str, str]]:
    """What matters most first."""
    by_case = {
        case: turns([n for n in CASES[case] if not options.only or n in options.only], options.repetitions)
        for case in options.case
    }
    longest = max(map(len, by_case.values()))
    return [
        (case, names[number])
        for number in range(longest)
        for case, names in by_case.items()
        if number < len(names)
    ]


def _usual_s(results: dict[str, list[dict[str, Any]]]) -> float:
    """Seconds that the quickest child took, imports included; the next takes at least as long."""
    return min(
        (child["child_s"] for found in results.values() for child in found if "tokens" in child), default=0.0
    )


def _passed_on(model: Path, options: argparse.Namespace) -> list[str]:
    given = {
        "--rows": options.rows,
        "--model": model,
        "--steps": options.steps,
        "--discard": options.discard,
        "--device": options.device,
    }
    flags = ["--tiny"] if options.tiny else []
    return [*flags, *(str(part) for pair in given.items() for part in pair)]


def _write(summary: dict[str, Any], report: Path | None) -> None:
    if report is None:
        return
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(format_report(summary), encoding="utf-8")
    report.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
