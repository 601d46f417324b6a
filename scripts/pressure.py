"""Write profiles/calibration/pressure.json: what traced steps lose to holes on a card with no room to spare.

The requests of every traced setup are replayed on ever smaller cards; some minutes on one core. `--only TEXT` redoes the setups whose label contains it and prints them instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.trace.allocator_rules import ROUND_LARGE_BYTES
from bench.trace.estimate import Traced, trace_on
from bench.trace.replay import least_capacity_bytes, replay
from planner.catalog import find_gpu
from planner.files import write_atomically
from planner.methods import find_method
from planner.pressure import keeps_logits
from planner.setup import TrainSetup
from planner.specs import Machine

TARGET = Path(__file__).parents[1] / "profiles" / "calibration" / "pressure.json"
GPU = "A100 80GB SXM4"

STEP: dict[str, Any] = {"checkpointing": "full", "attention": "flash"}
LORA: dict[str, Any] = {**STEP, "method": "lora"}
QLORA: dict[str, Any] = {**STEP, "method": "qlora", "kbit_upcast": True, "autocast": "bfloat16"}
FULL: dict[str, Any] = {**STEP, "method": "full"}
PAGED: dict[str, Any] = {"kbit_upcast": False, "optimizer": "paged-adamw-8bit"}

FUSED: dict[str, Any] = {"kernels": "fused"}
LIGER: dict[str, Any] = {"kernels": "liger", "loss": "fused"}

SMALL = ("qwen2.5-1.5b", "llama-3.2-1b", "smollm2-1.7b")
LARGE = ("mistral-7b-v0.1", "llama-3.1-8b", "qwen2.5-7b")


def setups() -> Iterator[dict[str, Any]]:
    """Methods, models, and which phase decides, as varied as some minutes allow."""
    for model in SMALL:
        for recipe in (LORA, QLORA, FULL):
            yield {**recipe, "model": model, "micro_batch_size": 4, "seq_len": 2048}
        yield {**FULL, "model": model, "micro_batch_size": 1, "seq_len": 512}
        yield {**FULL, **LIGER, "model": model, "micro_batch_size": 8, "seq_len": 2048}
    for model in LARGE:
        yield {**LORA, "model": model, "micro_batch_size": 1, "seq_len": 4096}
        yield {**LORA, "model": model, "micro_batch_size": 8, "seq_len": 4096}
        yield {**LORA, "model": model, "micro_batch_size": 2, "seq_len": 2048, "checkpointing": "none"}
        yield {**QLORA, "model": model, "micro_batch_size": 1, "seq_len": 4096}
        yield {**QLORA, **PAGED, "model": model, "micro_batch_size": 2, "seq_len": 2048}
        yield {**FULL, "model": model, "micro_batch_size": 1, "seq_len": 1024}
        yield {**FULL, "model": model, "micro_batch_size": 4, "seq_len": 4096}
        for size in (1, 4):
            yield {**FULL, **FUSED, "model": model, "micro_batch_size": size, "seq_len": 4096}
        yield {**LORA, **FUSED, "model": model, "micro_batch_size": 4, "seq_len": 4096}
        yield {**QLORA, **FUSED, "model": model, "micro_batch_size": 8, "seq_len": 2048}
        for size in (4, 8):
            yield {**FULL, **LIGER, "model": model, "micro_batch_size": size, "seq_len": 4096}
        yield {**FULL, **LIGER, "model": model, "micro_batch_size": 16, "seq_len": 4096}
        yield {**LORA, **LIGER, "model": model, "micro_batch_size": 8, "seq_len": 4096}
        yield {**QLORA, **LIGER, "model": model, "micro_batch_size": 16, "seq_len": 2048}
    yield {**FULL, "model": "gpt2", "micro_batch_size": 4, "seq_len": 1024, "attention": "sdpa"}
    common = {**FULL, "micro_batch_size": 4, "seq_len": 2048}
    yield {**common, "model": "llama-3.2-1b", "weights_dtype": "float32", "autocast": "bfloat16"}
    yield {**common, "model": "llama-3.2-3b", "optimizer": "adamw-8bit"}
    yield {**common, "model": "llama-3.2-3b", "optimizer": "adamw-fused", "loss": "chunked"}


def label(fields: dict[str, Any]) -> str:
    """The setup in words, as the table names it."""
    shape = f"{fields['model']} {fields['method']} {fields['micro_batch_size']} x {fields['seq_len']}"
    shown = {k: v for k, v in fields.items() if k in ("optimizer", "loss", "kernels", "weights_dtype")}
    extra = [f"{key} {value}" for key, value in shown.items()]
    return ", ".join([shape, f"checkpointing {fields['checkpointing']}", *extra])


def replayed(fields: dict[str, Any]) -> dict[str, Any]:
    """One row: sizes in bytes, shares of what the step adds to the steady memory."""
    setup = TrainSetup.from_dict(fields)
    traced = trace_on(setup, Machine(gpu=find_gpu(GPU)))
    requests = list(traced.requests())
    unlimited = replay(requests)
    least = least_capacity_bytes(requests)
    phases = traced.estimate.memory.phases
    phase = bottleneck(traced, least)
    return {
        "setup": label(fields),
        "trains_base": find_method(setup.method).trains_base,
        "keeps_logits": keeps_logits(setup),
        "phase": phase,
        "lost_share": round((least - phases[phase]) / (phases[phase] - phases["save"]), 4),
        "phase_allocated_bytes": phases[phase],
        "peak_allocated_bytes": unlimited.peak_allocated_bytes,
        "peak_reserved_bytes": unlimited.peak_reserved_bytes,
        "least_capacity_bytes": least,
    }


def bottleneck(traced: Traced, least: int) -> str:
    """The phase whose request fails on a card that is just too small."""
    failed = traced.failure(traced.replayed(capacity_bytes=least - 2 * ROUND_LARGE_BYTES))
    memory = traced.estimate.memory
    return failed["phase"] if failed and failed["phase"] in memory.phases else memory.peak_phase


def main() -> None:
    """Write the table, or print the chosen rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="TEXT")
    only = parser.parse_args().only
    rows = []
    for fields in setups():
        if only is None or only in label(fields):
            rows.append(replayed(fields))
            print(json.dumps(rows[-1]), file=sys.stderr if only is None else sys.stdout, flush=True)
    if only is None:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        write_atomically(TARGET, f'{{"schema_version": 1, "steps": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
