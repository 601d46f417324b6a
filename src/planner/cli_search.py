"""`finefit plan`: one machine's first choice, or the best of many machines, methods and offers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cli_options import (
    LOCAL,
    SectionedCommand,
    Session,
    complete_gpus,
    given_fields,
    json_option,
    resolve_machine,
    setup_options,
)
from planner.cli_plan import row_lengths, summarise
from planner.cli_tables import complete_model, online_option
from planner.errors import LimitError, UsageError
from planner.planfile import write_plan
from planner.render import format_json, terminal_width

if TYPE_CHECKING:
    from planner.lengths import DataLengths
    from planner.optimise import Question
    from planner.options import Limits, Outcome
    from planner.places import Place
    from planner.specs import Machine, ModelSpec

GOALS = ("fastest", "cheapest", "longest-context", "best-quality")
LICENSES = ("commercial",)


def _search_options(function: Any) -> Any:
    """The options that open or narrow the search."""
    options = (
        click.option(
            "--gpu",
            "gpus",
            multiple=True,
            metavar="GPU[:N]",
            shell_complete=lambda ctx, param, incomplete: complete_gpus(incomplete),
            help="GPU and how many, as in rtx-4090:2; local is this machine; may be repeated.",
        ),
        click.option("--goal", type=click.Choice(GOALS), help="What to look for among all that fits."),
        click.option("--budget", metavar="AMOUNT", help="Most that the run may cost, as in 20usd or 150cny."),
        click.option("--deadline", metavar="TIME", help="Longest that it may take, as in 8h, 90min or 2d."),
        click.option("--license", "licence", type=click.Choice(LICENSES), help="What the model must allow."),
        click.option(
            "--cloud", is_flag=True, help="Look at rented machines too; --gpu then names their cards."
        ),
        click.option(
            "--provider",
            "providers",
            multiple=True,
            metavar="NAME",
            help="Rent from this one; may be repeated.",
        ),
        click.option("--on-demand", is_flag=True, help="Leave spot offers out."),
        click.option("--local-only", is_flag=True, help="This machine and nothing else."),
        click.option(
            "--keep-method", is_flag=True, help="Never quantise to make it fit: --method, else lora."
        ),
        click.option(
            "--tokens",
            type=click.FloatRange(1),
            metavar="N",
            help="Tokens to train on, where no data says it.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """The command's own options."""

    gpus: tuple[str, ...]
    goal: str | None
    budget: str | None
    deadline: str | None
    licence: str | None
    cloud: bool
    providers: tuple[str, ...]
    on_demand: bool
    local_only: bool
    keep_method: bool
    tokens: float | None
    global_batch_size: int | None

    @property
    def rents(self) -> bool:
        """Whether rented machines are looked at."""
        return self.cloud or bool(self.providers)

    @property
    def is_open(self) -> bool:
        """Whether more than one machine's first choice is asked for."""
        return self.rents or len(self.gpus) > 1 or any((self.goal, self.budget, self.deadline))

    def check(self) -> None:
        """Raise UsageError for options that contradict each other."""
        if self.local_only and (self.rents or any(not _is_local(gpu) for gpu in self.gpus)):
            raise UsageError("--local-only leaves no room for --cloud, --provider or another --gpu")
        if not (self.gpus or self.rents or self.local_only):
            raise UsageError(
                "which GPU? --gpu GPU[:N], --gpu local for this machine, or --cloud for all that can be rented "
                "(see `finefit list gpus`)"
            )


def _is_local(gpu: str) -> bool:
    return gpu.partition(":")[0].strip().lower() == LOCAL


@click.command(
    "plan",
    cls=SectionedCommand,
    epilog="Example: finefit plan llama-3.1-8b --cloud --data my.jsonl --goal cheapest --deadline 8h",
)
@click.argument("model", shell_complete=complete_model)
@_search_options
@click.option(
    "--global-batch-size", type=click.IntRange(min=1), metavar="N", help="Sequences per optimizer step."
)
@click.option(
    "--out", metavar="FILE", default="plan.yaml", show_default=True, help="Where the plan is written."
)
@click.option("--force", is_flag=True, help="Overwrite a file that is not a finefit plan.")
@online_option
@setup_options(without=("model",), shows_default=False)
@json_option
@click.pass_obj
def plan_command(
    session: Session, /, model: str, out: str, force: bool, online: bool, as_json: bool, **options: Any
) -> int:
    """Choose a configuration, say why, and write it to a file.

    With one --gpu alone, the first choice that fits. With --goal, --budget, --deadline, --cloud or several --gpu, the
    best of all methods, precisions, batches, shardings, machines and offers, and the front of time, cost and quality.
    Quality is an order, never a number: tokens that aren't cut off, then full before LoRA before QLoRA, then the rank
    (docs/search.md has the sources). Rows with a chosen and a rejected answer: --objective dpo. Every option below fixes what would otherwise be chosen. Exit code 3 means that
    nothing fits, or nothing is within the limits.
    """
    from planner.search import open_model

    asked = _Asked(**{name: options.pop(name) for name in _Asked.__slots__})
    asked.check()
    wishes = {"model": model, **given_fields(options)}
    if asked.keep_method:
        wishes.setdefault("method", "lora")
    spec = open_model(wishes, offline=not online)
    if asked.licence is not None:
        _check_licence(spec, asked.licence)
    lengths, why_estimated = row_lengths(session, wishes)
    job = _Job(session, asked, wishes, spec, lengths, as_json)
    written = job.search(out, force) if asked.is_open else job.first_choice(out, force)
    for note in (why_estimated, written):
        if note:
            click.echo(note, err=True)
    return 0


def _check_licence(model: ModelSpec, wanted: str) -> None:
    """Raise LimitError where the model's licence isn't known to allow it."""
    from planner.fits import LICENSES as ALLOW

    if ALLOW[wanted](model):
        return
    known = "its licence isn't known" if model.license is None else f"its licence is {model.license}"
    raise LimitError(
        f"{model.name}: {known}, {wanted} use: {model.commercial or 'unknown'}; "
        f"`finefit fits GPU --license {wanted}` lists models that allow it"
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """One plan's question; each way answers, prints and writes, and says what was written."""

    session: Session
    asked: _Asked
    wishes: dict[str, Any]
    model: ModelSpec
    lengths: DataLengths | None
    as_json: bool

    def first_choice(self, out: str, force: bool) -> str:
        """The first choice that fits on one machine."""
        from planner.render_estimate import format_plan_answer
        from planner.render_run import format_run
        from planner.run_time import run_time
        from planner.search import plan

        machine = self._machine(LOCAL if self.asked.local_only else self.asked.gpus[0], self.wishes)
        found = plan(
            self.wishes,
            machine,
            global_batch=self.asked.global_batch_size,
            lengths=self.lengths,
            model=self.model,
        )
        setup = found.estimate.setup
        write_plan(Path(out), setup, _label(machine), summarise(found.estimate), force=force)
        run = run_time(setup, found.estimate.time, machine, self.model, self.lengths, self.asked.tokens)
        if self.as_json:
            click.echo(format_json({**found.to_json(), "run": run and run.to_json()}))
        else:
            more = "" if run is None else format_run(run, terminal_width())
            click.echo(format_plan_answer(found, terminal_width(), more))
        return f"wrote {out}; next: finefit bench {out}, finefit train {out}"

    def search(self, out: str, force: bool) -> str:
        """The best of many."""
        from planner.optimise import optimise
        from planner.render_search import format_outcome

        found = optimise(self._question())
        chosen = found.chosen
        write_plan(
            Path(out), chosen.estimate.setup, _label(chosen.machine), summarise(chosen.estimate), force=force
        )
        click.echo(format_json(found.to_json()) if self.as_json else format_outcome(found, terminal_width()))
        return f"wrote {out}; next: {_next_step(found, out)}"

    def _question(self) -> Question:
        import datetime

        from planner.costs import CostWishes
        from planner.optimise import Question
        from planner.prices import known_prices
        from planner.search_options import parse_limits
        from planner.tariffs import SECTORS, WORLD, tariff

        if self.wishes.get("num_nodes", 1) > 1:
            raise UsageError("a search looks at single machines; plan several nodes with one --gpu alone")
        today = datetime.date.today()
        known = known_prices((), today)
        limits, currency = parse_limits(self.asked.budget, self.asked.deadline, known.rates)
        self._check_length(limits)
        places = self._places(known.book, today)
        return Question(
            wishes=self.wishes,
            model=self.model,
            places=places,
            goal=self.asked.goal or ("cheapest" if len(places) > 1 else "fastest"),
            book=known.book,
            rates=known.rates,
            today=today,
            limits=limits,
            money=CostWishes(
                currency=currency, is_owned=True, tariff=tariff(WORLD, known.rates, currency, SECTORS[False])
            ),
            lengths=self.lengths,
            tokens=self.asked.tokens,
            global_batch=self.asked.global_batch_size,
        )

    def _check_length(self, limits: Limits) -> None:
        knows_length = self.lengths is not None or self.asked.tokens is not None or "max_steps" in self.wishes
        needs_length = limits.words or self.asked.goal == "cheapest"
        if needs_length and not knows_length:
            raise UsageError(
                "what a run costs and takes depends on its length: give --data, --tokens or --max-steps"
            )

    def _places(self, book: Any, today: Any) -> list[Place]:
        from planner.catalog import find_gpu
        from planner.places import owned, rented

        asked = self.asked
        names = [*asked.gpus, *([LOCAL] if asked.local_only and not asked.gpus else [])]
        own = [name for name in names if _is_local(name) or not asked.rents]
        places = owned(self._machine(name, dict(self.wishes)) for name in own)
        if asked.rents:
            wanted = [find_gpu(name.partition(":")[0]).name for name in names if name not in own]
            counts = {name.partition(":")[2] for name in names if name not in own} - {""}
            if "num_gpus" in self.wishes:
                counts = {str(self.wishes["num_gpus"])}
            places += [
                place
                for place in rented(
                    book, today, gpus=wanted, providers=asked.providers, with_spot=not asked.on_demand
                )
                if not counts or str(place.machine.num_gpus) in counts
            ]
        return places

    def _machine(self, gpu: str, fields: dict[str, Any]) -> Machine:
        return resolve_machine(self.session, gpu, fields)


def _label(machine: Machine) -> str:
    return LOCAL if machine.is_local else machine.label


def _next_step(found: Outcome, out: str) -> str:
    if found.chosen.machine.is_local:
        return f"finefit bench {out}, finefit train {out}"
    return f"finefit costs {out}, finefit export {out} --to FORMAT --out DIR"
