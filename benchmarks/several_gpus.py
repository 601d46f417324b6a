"""Live tensor bytes per rank of steps that really ran on several processes, beside the closed form's and the trace's.

    python benchmarks/several_gpus.py              writes reports/several-gpus.md from reports/several-gpus.jsonl
    python benchmarks/several_gpus.py --measure    first runs the cases that the raw file lacks (minutes; CPU, gloo)

The processes run the step that bench.trace traces, on real tensors under the same tracker.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
RAW = ROOT / "reports" / "several-gpus.jsonl"
REPORT = ROOT / "reports" / "several-gpus.md"

BASE: dict[str, Any] = {
    "model": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
    "from_scratch": True,
    "method": "full",
    "micro_batch_size": 1,
    "max_grad_norm": None,
}
TIED = {"model": {**BASE["model"], "tie_word_embeddings": True}}
ACCUMULATED = {"grad_accum_steps": 2}
AUTOCAST = {"weights_dtype": "float32", "autocast": "bfloat16"}
QLORA = {"method": "qlora", "quant": "nf4-double"}
FSDP, DDP, ZERO1, ZERO2, ZERO3 = ({"sharding": name} for name in ("fsdp", "ddp", "zero1", "zero2", "zero3"))

CASES: dict[str, dict[str, Any]] = {
    "fsdp full": {**FSDP, "num_gpus": 2, "seq_len": 256},
    "fsdp full, 4 ranks, no checkpointing": {**FSDP, "num_gpus": 4, "seq_len": 256, "checkpointing": "none"},
    "fsdp full, short rows": {**FSDP, "num_gpus": 2, "seq_len": 64},
    "fsdp full, tied": {**FSDP, "num_gpus": 2, "seq_len": 256, **TIED},
    "fsdp full, mixed precision": {**FSDP, "num_gpus": 2, "seq_len": 256, **AUTOCAST},
    "fsdp LoRA": {**FSDP, "num_gpus": 2, "seq_len": 256, "method": "lora"},
    "fsdp LoRA, short rows, 4 ranks": {**FSDP, "num_gpus": 4, "seq_len": 32, "method": "lora"},
    "fsdp LoRA, mixed precision": {**FSDP, "num_gpus": 2, "seq_len": 32, "method": "lora", **AUTOCAST},
    "ddp full": {**DDP, "num_gpus": 2, "seq_len": 256},
    "ddp full, short rows, no checkpointing": {
        **DDP,
        "num_gpus": 2,
        "seq_len": 32,
        "checkpointing": "none",
    },
    "ddp LoRA, 4 ranks": {**DDP, "num_gpus": 4, "seq_len": 256, "method": "lora"},
    "ddp LoRA, mixed precision": {**DDP, "num_gpus": 2, "seq_len": 256, "method": "lora", **AUTOCAST},
    "zero1 full": {**ZERO1, "num_gpus": 2, "seq_len": 256},
    "zero1 LoRA": {**ZERO1, "num_gpus": 2, "seq_len": 256, "method": "lora"},
    "zero2 full": {**ZERO2, "num_gpus": 2, "seq_len": 256},
    "zero2 LoRA": {**ZERO2, "num_gpus": 2, "seq_len": 256, "method": "lora"},
    "zero3 full": {**ZERO3, "num_gpus": 2, "seq_len": 256},
    "zero3 LoRA": {**ZERO3, "num_gpus": 2, "seq_len": 256, "method": "lora"},
    "zero2 full, master weights": {**ZERO2, "num_gpus": 2, "seq_len": 256, "master_weights": "float32"},
    "zero3 full, short reuse": {**ZERO3, "num_gpus": 2, "seq_len": 256},
    "zero2 full, 4 ranks, larger bucket": {**ZERO2, "num_gpus": 4, "seq_len": 256},
    "zero1 full, short rows": {**ZERO1, "num_gpus": 2, "seq_len": 32},
    "zero3 LoRA, 4 ranks, short reuse": {**ZERO3, "num_gpus": 4, "seq_len": 64, "method": "lora"},
    "zero3 full, short reuse, no checkpointing": {
        **ZERO3,
        "num_gpus": 2,
        "seq_len": 128,
        "checkpointing": "none",
    },
    "zero2 full, tied, no checkpointing": {
        **ZERO2,
        "num_gpus": 2,
        "seq_len": 128,
        "checkpointing": "none",
        **TIED,
    },
    "zero2 LoRA, 4 ranks, larger bucket": {**ZERO2, "num_gpus": 4, "seq_len": 32, "method": "lora"},
    "fsdp full, accumulated": {**FSDP, "num_gpus": 2, "seq_len": 64, **ACCUMULATED},
    "fsdp full, accumulated, mixed precision": {
        **FSDP,
        "num_gpus": 4,
        "seq_len": 64,
        **ACCUMULATED,
        **AUTOCAST,
    },
    "fsdp LoRA, accumulated": {**FSDP, "num_gpus": 2, "seq_len": 64, "method": "lora", **ACCUMULATED},
    "ddp full, accumulated": {**DDP, "num_gpus": 2, "seq_len": 64, **ACCUMULATED},
    "ddp LoRA, accumulated, 4 ranks": {
        **DDP,
        "num_gpus": 4,
        "seq_len": 64,
        "method": "lora",
        **ACCUMULATED,
    },
    "zero1 full, accumulated": {**ZERO1, "num_gpus": 2, "seq_len": 64, **ACCUMULATED},
    "zero2 full, accumulated": {**ZERO2, "num_gpus": 2, "seq_len": 64, **ACCUMULATED},
    "zero2 LoRA, accumulated, 4 ranks": {
        **ZERO2,
        "num_gpus": 4,
        "seq_len": 64,
        "method": "lora",
        **ACCUMULATED,
    },
    "zero3 full, accumulated": {**ZERO3, "num_gpus": 2, "seq_len": 64, **ACCUMULATED},
    "fsdp QLoRA": {**FSDP, "num_gpus": 2, "seq_len": 256, **QLORA},
    "fsdp QLoRA, 4 ranks": {**FSDP, "num_gpus": 4, "seq_len": 64, **QLORA},
    "fsdp QLoRA, accumulated": {**FSDP, "num_gpus": 2, "seq_len": 64, **QLORA, **ACCUMULATED},
    "ddp QLoRA": {**DDP, "num_gpus": 2, "seq_len": 64, **QLORA},
}
SMALL = {"bucket": 500_000}
ZERO_SIZES: dict[str, dict[str, int]] = {
    **{f"zero{stage} full": SMALL for stage in (1, 2, 3)},
    **{f"zero{stage} LoRA": {"bucket": 20_000} for stage in (1, 2, 3)},
    "zero2 full, master weights": SMALL,
    "zero3 full, short reuse": {**SMALL, "reuse": 1_500_000, "prefetch": 500_000},
    "zero2 full, 4 ranks, larger bucket": {"bucket": 2_000_000},
    "zero1 full, short rows": {"bucket": 2_000_000},
    "zero3 LoRA, 4 ranks, short reuse": {"bucket": 20_000, "reuse": 1_000_000, "prefetch": 200_000},
    "zero3 full, short reuse, no checkpointing": {
        "bucket": 1_000_000,
        "reuse": 2_000_000,
        "prefetch": 300_000,
    },
    "zero2 full, tied, no checkpointing": {"bucket": 800_000},
    "zero2 LoRA, 4 ranks, larger bucket": {"bucket": 200_000},
    **{f"zero{stage} full, accumulated": SMALL for stage in (1, 2, 3)},
    "zero2 LoRA, accumulated, 4 ranks": {"bucket": 20_000},
}
"""By case, the elements of DeepSpeed's buffers (planner.sharding.ZeroSizes): the defaults would hide so small a model."""


def rows() -> dict[str, dict[str, Any]]:
    """The raw file by case."""
    if not RAW.exists():
        return {}
    lines = RAW.read_text(encoding="utf-8").splitlines()
    return {row["case"]: row for row in map(json.loads, lines)}


def measure() -> None:
    """Run each case that the raw file lacks, and append it."""
    from bench.trace.processes import measure_ranks
    from planner import sharding
    from planner.setup import TrainSetup

    done = rows()
    for name, changes in CASES.items():
        if name in done:
            continue
        sizes = ZERO_SIZES.get(name, {})
        ranks = measure_ranks(TrainSetup(**{**BASE, **changes}), replace(sharding.ZERO, **sizes))
        row = {
            "case": name,
            "setup": {**BASE, **changes},
            "zero": sizes,
            "torch": version("torch"),
            "ranks": ranks,
        }
        with RAW.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(name, flush=True)


def predict(values: dict[str, Any], sizes: dict[str, int]) -> tuple[dict[str, int], dict[str, int] | None]:
    """Phases by the closed form and by the trace, on this CPU; None where the trace can't tell."""
    from bench.trace.estimate import TRACED_SHARDINGS
    from bench.trace.run import trace
    from planner import sharding
    from planner.estimate import resolve
    from planner.memory import MemoryModel
    from planner.setup import TrainSetup

    setup = TrainSetup(**values)
    with mock.patch.object(sharding, "ZERO", replace(sharding.ZERO, **sizes)):
        model = MemoryModel(setup, resolve(setup), on_gpu=False)
    closed = model.at(setup.micro_batch_size, setup.seq_len).phases
    if setup.sharding not in TRACED_SHARDINGS:
        return dict(closed), None
    traced = trace(setup, on_gpu=False, all_layers=True)
    return dict(closed), {name: peak.num_bytes for name, peak in traced.phases.items()}


def report() -> str:
    """The Markdown text."""
    lines, errors, phase_errors = [], ([], []), ([], [])
    for name, row in rows().items():
        predictions = predict(row["setup"], row.get("zero", {}))
        peaks = [max(rank.values()) for rank in row["ranks"]]
        highest_rank = max(row["ranks"], key=lambda rank: max(rank.values()))
        phase = max(highest_rank, key=highest_rank.get)
        cells = [name, str(len(peaks)), phase, " / ".join(f"{p / 1e6:.3f}" for p in sorted(set(peaks)))]
        for predicted, found, by_phase in zip(predictions, errors, phase_errors, strict=True):
            if predicted is None:
                cells += ["", ""]
                continue
            error = max(predicted.values()) / max(peaks) - 1
            found.append(error)
            highest = {n: max(rank[n] for rank in row["ranks"]) for n in row["ranks"][0]}
            by_phase += [predicted[n] / size - 1 for n, size in highest.items()]
            cells += [f"{max(predicted.values()) / 1e6:.3f}", f"{error:+.2%}"]
        lines.append("| " + " | ".join(cells) + " |")
    buckets = " or ".join(f"{n:,}" for n in sorted({z["bucket"] for z in ZERO_SIZES.values()}))
    return TEXT.format(
        buckets=buckets, table="\n".join(lines), summary="\n".join(_summary(errors, phase_errors))
    )


def _summary(errors: Any, phase_errors: Any) -> list[str]:
    out = []
    for name, found, by_phase in zip(("closed form", "trace"), errors, phase_errors, strict=True):
        mean, worst = fmean(map(abs, found)), max(map(abs, found))
        phases = max(map(abs, by_phase))
        out.append(f"| {name} | {mean:.2%} | {worst:.2%} | {fmean(map(abs, by_phase)):.2%} | {phases:.2%} |")
    return out


TEXT = """# Several GPUs: measured on processes, by the closed form and by the trace

Made by `python benchmarks/several_gpus.py` from `several-gpus.jsonl`. Each case is a Llama of four layers (hidden 256,
vocabulary 4,096), run for two optimizer steps on 2 or 4 real processes (CPU, gloo). Every live tensor storage of a rank
is counted; the figures are the second step's highest moments in MB (10^6 bytes), where ranks differ all of them.
Errors are those of the rank that holds most: it decides whether a run fits.

| | mean error of the peak | worst | mean error of all phases | worst |
|---|---|---|---|---|
{summary}

| case | ranks | highest phase | measured | closed form | error | trace | error |
|---|---|---|---|---|---|---|---|
{table}

DeepSpeed's reduce bucket has 5e8 elements, 1 GB, by default, and hides the rest of so small a model. In these runs it has
{buckets} elements, and the closed form takes the same; exported files have the default. Ranks of ZeRO-1 differ: one that has the
end of the parameters frees more gradients before its flat share is made. What stage 3 gathers ahead and keeps, and what a
stage reduces at once, is not a formula but DeepSpeed's own bookkeeping, replayed by sizes (`planner/zero_replay.py`);
the cases with `short reuse` and `larger bucket` have models larger than these buffers. Not within 3 %, and not
the peak: evaluations under stage 3, by +6.8 % without checkpointing and by -13.9 % after accumulated steps.
Offload is proved by nothing here: on a CPU the engine's device and its host are the same memory.

`accumulated`: two micro-batches, gradients exchanged in the last one only, as Trainer and accelerate do (`no_sync`,
`set_requires_gradient_sync(False)`; DeepSpeed's engine by itself). QLoRA's packed weights are bitsandbytes' NF4 with
nested constants, under FSDP2 stored as bfloat16, which is what it can split; each rank holds all constants.

FSDP2 is `torch.distributed.fsdp.fully_shard` in accelerate's groups (each layer; embedding; final norm and head; the
root), DDP is torch's with accelerate's defaults. What this can't show: NCCL's own memory, and what CUDA's side streams
add to *reserved* memory; how long tensors live doesn't depend on them, since FSDP2 holds its buffers by reference.
"""


if __name__ == "__main__":
    if "--measure" in sys.argv[1:]:
        measure()
    REPORT.write_text(report(), encoding="utf-8")
