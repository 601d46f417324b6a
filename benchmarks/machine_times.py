"""Predicted beside measured step times on this machine, for setups that its calibration never saw.

    finefit machine && python benchmarks/machine_times.py [--report reports/machine-times.md] [--results FILE]

24 setups of 0.05 to 1.5 billion parameters, LoRA, QLoRA and full, with checkpointing and without, 128 to 2048 tokens, from
random weights. Each is predicted from what `finefit machine` measured, then really run in a child process: the median
of three steps after one to warm up. Let nothing else run beside it. The last line is one JSON object; exit code 3 when the mean
error is above 10 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.anonymise import anonymise
from bench.host import read_cpu, read_memory
from bench.machine import cpu_machine
from bench.store import append_result
from bench.verify import Rung, VerifyRow, verify
from planner.rates import local_rates, machine_file
from planner.setup import TrainSetup

MUST_REACH = 0.10
BUDGET_S = 3600.0


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> dict[str, Any]:
    """A Llama of any size."""
    return {
        "_name_or_path": f"llama-{hidden}x{layers}",
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


MODELS = {
    "50M": llama(512, 8, 8, 4, 1408, 32_000),
    "135M": "smollm2-135m",
    "360M": "smollm2-360m",
    "0.5B": "qwen2.5-0.5b",
    "1.1B": "tinyllama-1.1b",
    "1.5B": "qwen2.5-1.5b",
}
CASES: tuple[tuple[str, str, str, int, int, dict[str, Any]], ...] = (
    ("50M", "full", "none", 1, 512, {}),
    ("50M", "full", "full", 2, 512, {}),
    ("50M", "full", "none", 1, 512, {"weights_dtype": "float32"}),
    ("50M", "lora", "none", 4, 256, {}),
    ("50M", "lora", "full", 1, 2048, {}),
    ("50M", "lora", "none", 1, 1024, {"weights_dtype": "float32"}),
    ("50M", "qlora", "none", 1, 1024, {}),
    ("135M", "full", "none", 1, 512, {}),
    ("135M", "full", "full", 1, 1024, {}),
    ("135M", "lora", "none", 1, 128, {}),
    ("135M", "lora", "none", 4, 512, {}),
    ("135M", "lora", "full", 4, 512, {}),
    ("135M", "lora", "full", 1, 2048, {}),
    ("135M", "lora", "none", 2, 512, {"weights_dtype": "float32", "loss": "chunked"}),
    ("135M", "qlora", "none", 1, 512, {}),
    ("135M", "qlora", "full", 2, 512, {}),
    ("360M", "lora", "none", 1, 512, {}),
    ("360M", "full", "full", 1, 512, {}),
    ("360M", "qlora", "full", 1, 1024, {}),
    ("0.5B", "lora", "full", 1, 512, {}),
    ("0.5B", "lora", "none", 2, 256, {"loss": "chunked"}),
    ("0.5B", "full", "none", 1, 256, {}),
    ("1.1B", "lora", "full", 1, 512, {}),
    ("1.5B", "lora", "full", 1, 256, {"loss": "chunked"}),
)
"""Model, method, checkpointing, micro-batch, length, other fields."""


def rungs() -> tuple[Rung, ...]:
    """The setups."""
    return tuple(_rung(*case) for case in CASES)


def _rung(size: str, method: str, checkpointing: str, rows: int, length: int, others: dict[str, Any]) -> Rung:
    setup = TrainSetup(
        model=MODELS[size],
        from_scratch=True,
        method=method,
        checkpointing=checkpointing,
        micro_batch_size=rows,
        seq_len=length,
        optimizer="adamw-fused",
        **others,
    )
    words = [size, method, f"{rows} x {length}", setup.weights_dtype, setup.loss + " loss"]
    return Rung(name=", ".join([*words, "checkpointed"] if checkpointing == "full" else words), setup=setup)


def main() -> None:
    options = parse_arguments()
    machine = cpu_machine(read_cpu(), read_memory())
    rates = local_rates(machine_file(machine.gpu))
    if rates is None:
        sys.exit("run `finefit machine` first: nothing was measured on this machine")
    chosen = [rung for i, rung in enumerate(rungs()) if options.only is None or i in options.only]
    found = verify(
        machine,
        budget_s=BUDGET_S,
        rungs=chosen,
        progress=lambda rung, step: print(f"{rung.name}: {step}", end="\r", file=sys.stderr),
    )
    for case in found.cases if options.results else ():
        if case.measurement is not None:
            append_result(options.results, anonymise(case.measurement))
    rows = [row for row in found.rows if row.quantity == "step_s"]
    notes = [f"{case.rung.name}: {case.note}" for case in found.cases if case.note]
    table = format_table(rows)
    print(table, *notes, sep="\n")
    errors = [abs(row.predicted_error) for row in rows if row.predicted_error is not None]
    summary = {
        "num_setups": len(errors),
        "mean_error": statistics.mean(errors),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "notes": notes,
    }
    if options.report:
        options.report.write_text(format_report(table, summary, rates.source), encoding="utf-8")
    print(json.dumps(summary))
    sys.exit(3 if summary["mean_error"] > MUST_REACH else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--report", type=Path)
    parser.add_argument(
        "--results",
        type=Path,
        help="Append each run's record, for `finefit calibrate` and `finefit compare`.",
    )
    parser.add_argument("--only", type=int, nargs="*", help="Numbers of setups, from 0.")
    return parser.parse_args()


def format_table(rows: Sequence[VerifyRow]) -> str:
    """Markdown."""
    lines = ["| setup | predicted s | measured s | error |", "|---|---|---|---|"]
    for row in rows:
        error = "unknown" if row.predicted_error is None else f"{row.predicted_error:+.1%}"
        predicted = "unknown" if row.predicted is None else f"{row.predicted:.2f}"
        lines.append(f"| {row.name} | {predicted} | {row.measured:.2f} | {error} |")
    return "\n".join(lines)


def format_report(table: str, summary: dict[str, Any], source: str) -> str:
    """A page."""
    body = (__doc__ or "").split("\n\n", 2)[2].strip()
    figures = (
        f"{summary['num_setups']} setups: mean error {summary['mean_error']:.1%} (wanted: at most {MUST_REACH:.0%}), "
        f"median {summary['median_error']:.1%}, worst {summary['worst_error']:.1%}. Rates: {source}."
    )
    notes = "".join(f"\n* {note}" for note in summary["notes"])
    cpu = read_cpu()
    return "\n".join(
        [
            "# Step times on this machine",
            "",
            "Made by `python benchmarks/machine_times.py --report …` after `finefit machine`.",
            "",
            figures,
            notes,
            table,
            "",
            body,
            "",
            f"{cpu.model}, {cpu.num_cpus} processors.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
