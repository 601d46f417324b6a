"""`finefit train`: parses, calls and prints; heavy modules are imported inside."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bench.cli_commands import device_option, force_option, machine_here, plan_argument, predict
from bench.extras import require_train_extra
from planner.cli_options import SectionedCommand, Session, json_option, trust_option
from planner.cli_plan import set_option, summarise
from planner.planfile import read_plan
from planner.render import format_json, terminal_width


@click.command("train", cls=SectionedCommand, epilog="Example: finefit train plan.yaml --out runs/first")
@plan_argument
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the run (default: runs/NAME of the plan)."
)
@click.option("--no-resume", is_flag=True, help="Insist on a new folder.")
@click.option(
    "--allow-changes",
    "--override",
    is_flag=True,
    help="Go on under a plan that differs from the folder's, and note the difference.",
)
@click.option(
    "--save-every",
    "save_every_steps",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Default: a tenth of the run.",
)
@click.option(
    "--eval-every",
    "eval_every_steps",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Default: before and after only.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    metavar="N",
    help="End after N evaluations in a row without a lower held-out loss (needs --eval-every).",
)
@click.option(
    "--keep-best",
    is_flag=True,
    help="Keep the checkpoint of the lowest held-out loss, and make the result of it (needs --eval-every).",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts to answer at each evaluation, one a line, or rows of training data (default: two held-out rows).",
)
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events in the run's folder.")
@click.option(
    "--init-adapter",
    type=click.Path(file_okay=False),
    help="Go on from an earlier run's adapter: its folder, or the run's.",
)
@device_option
@force_option
@trust_option
@set_option
@json_option
@click.pass_obj
def train_command(
    session: Session,
    /,
    plan: Path,
    out: Path | None,
    no_resume: bool,
    init_adapter: str | None,
    force: bool,
    settings: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune as the plan says. The same command again resumes a run that was stopped.

    With num_gpus above 1 it starts one process per GPU (sharding ddp, fsdp, zero1, zero2 or zero3), or is started by
    torchrun: torchrun --nproc-per-node 4 --no-python finefit train plan.yaml

    Exit code 33: interrupted after a checkpoint; 143: stopped before one could be written.
    """
    require_train_extra("train")
    found = read_plan(plan, (*settings, f"init_adapter={init_adapter}") if init_adapter else settings)
    predicted = predict(found, machine_here(session, found, options["device"]), force=force)
    if predicted is not None:
        found = replace(found, predicted=summarise(predicted))
    from bench.cli_text import format_summary
    from bench.train import train

    folder = out or Path("runs") / plan.stem
    # libraries print where they please, and stdout is for the answer
    with redirect_stdout(sys.stderr):
        summary = train(found, folder, resume=not no_resume, **options).to_json()
    # torchrun starts this command once per GPU
    if os.environ.get("RANK", "0") == "0":
        click.echo(
            format_json(summary) if as_json else format_summary(summary, str(folder), terminal_width())
        )


COMMANDS: tuple[click.Command, ...] = (train_command,)
