"""The search: nothing that it leaves out is better, limits hold, the front is a front, and every miss has its gap."""

from __future__ import annotations

import datetime
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.cli import run
from planner.catalog import find_gpu
from planner.cli_options import Session
from planner.errors import DoesNotFitError, LimitError, UsageError
from planner.estimate import estimate
from planner.fitting import BatchShape, Fitted, Fitter
from planner.hf_config import model_spec
from planner.lengths import DataLengths
from planner.money import Money, shipped_rates
from planner.offers import Offer
from planner.optimise import Question, optimise
from planner.options import GOALS, Limits, pareto
from planner.places import Place, owned, rented
from planner.price_book import PriceBook
from planner.quality import RANKS, RUNGS, filling_rank, rungs
from planner.recipes import rates_for
from planner.run_time import time_of_step
from planner.search_options import parse_duration
from planner.setup import TrainSetup
from planner.sizing import Sizer, Tally
from planner.specs import Machine
from planner.tactics import blocks, spots
from planner.units import GIB

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
MODEL = model_spec(CONFIG)
RTX_4090 = find_gpu("rtx-4090")
TODAY = datetime.date(2026, 11, 22)
NAMES = ("a100-80gb-sxm4", "rtx-4090")
LENGTHS = DataLengths.of([100, 300, 500, 1000] * 5, num_rows=4000, source="made up")


def machine(free_gib: float = 24.0, num_gpus: int = 1, name: str = "rtx-4090") -> Machine:
    return Machine(gpu=find_gpu(name), num_gpus=num_gpus, free_bytes=round(free_gib * GIB))


def offer(name: str, price: float, num_gpus: int = 1, as_of: str | None = "2026-11-20") -> Offer:
    return Offer(
        provider=f"cloud-{price:g}",
        gpu=find_gpu(name).name,
        num_gpus=num_gpus,
        low=price,
        high=price,
        as_of=as_of,
        source="a test",
    )


OFFERS = (offer(NAMES[0], 2.0), offer(NAMES[0], 9.0), offer(NAMES[1], 0.5), offer(NAMES[1], 0.3, as_of=None))


def question(**changes: object) -> Question:
    book = PriceBook(offers=OFFERS, clouds={})
    asked = Question(
        wishes={"model": CONFIG},
        model=MODEL,
        places=rented(book, TODAY),
        goal="cheapest",
        book=book,
        rates=shipped_rates(),
        today=TODAY,
        lengths=LENGTHS,
    )
    return replace(asked, **changes)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=12)
@example(rung=RUNGS[0], free_gib=2.0, num_gpus=1, seq_len=256)
@given(
    rung=st.sampled_from(RUNGS),
    free_gib=st.floats(1, 20),
    num_gpus=st.sampled_from([1, 2]),
    seq_len=st.sampled_from([256, 2048]),
)
def test_no_setup_that_was_left_out_is_faster(
    rung: object, free_gib: float, num_gpus: int, seq_len: int
) -> None:
    """Against all tactics that keep the states as exact and offload as little, at all micro-batches."""
    here, wishes = machine(free_gib, num_gpus), {"model": CONFIG, "rank": 16}
    shape = BatchShape(seq_len=seq_len, global_batch=8, is_packed=False)
    found = Fitter(MODEL, wishes, 16).best(rung, here, [shape])  # type: ignore[arg-type]
    if not isinstance(found, Fitted):
        assert not any(_all_fitting(rung, here, wishes, seq_len, lambda setup: True))
        return
    chosen = found.estimate.setup
    assert estimate(chosen, here, MODEL).fit.verdict == "fits"

    def is_alike(setup: TrainSetup) -> bool:
        return (setup.optimizer, setup.optimizer_in_backward, setup.offload) == (
            chosen.optimizer,
            chosen.optimizer_in_backward,
            chosen.offload,
        )

    if found.estimate.time is None:
        return
    pace = found.estimate.time.step_s / chosen.global_batch_size
    for other in _all_fitting(rung, here, wishes, seq_len, is_alike):
        time = time_of_step(other, here, MODEL)
        assert time is None or pace <= time.step_s / other.global_batch_size * 1.0001


def _all_fitting(rung, here, wishes, seq_len, is_wanted):  # type: ignore[no-untyped-def]
    per_rank = 8 // here.num_gpus
    for spot in spots(rung.method, here, wishes):
        tactics = (tactic for block in blocks(rung.method, here, spot, wishes) for tactic in block.tactics)
        for tactic, size in itertools.product(tactics, (s for s in (1, 2, 4, 8) if s <= per_rank)):
            setup = TrainSetup(
                **{
                    "seq_len": seq_len,
                    "num_gpus": here.num_gpus,
                    "grad_accum_steps": per_rank // size,
                    **rung.fields(here.gpu),
                    **tactic,
                    **wishes,
                    "micro_batch_size": size,
                }
            )
            if is_wanted(setup) and estimate(setup, here, MODEL).fit.verdict == "fits":
                yield setup


@settings(deadline=None, max_examples=25)
@given(
    rung=st.sampled_from(RUNGS),
    num_gpus=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([1, 4]),
    seq_len=st.sampled_from([128, 1024, 4096]),
)
def test_memory_grows_with_what_the_search_takes_as_growing(
    rung: object, num_gpus: int, size: int, seq_len: int
) -> None:
    here = machine(80, num_gpus)

    def peak(setup: TrainSetup) -> int:
        return estimate(setup, here, MODEL).memory.peak_allocated_bytes

    for spot in spots(rung.method, here, {}):  # type: ignore[attr-defined]
        block = next(blocks(rung.method, here, spot, {}))  # type: ignore[attr-defined]
        fields = {**rung.fields(here.gpu), **block.tactics[-1], "num_gpus": num_gpus}  # type: ignore[attr-defined]
        setup = TrainSetup(model=CONFIG, micro_batch_size=size, seq_len=seq_len, rank=RANKS[0], **fields)
        larger = [setup.with_(micro_batch_size=2 * size), setup.with_(seq_len=2 * seq_len)]
        larger += [setup.with_(rank=RANKS[-1])] if setup.uses_adapters else []
        assert all(peak(other) >= peak(setup) for other in larger)


@settings(deadline=None, max_examples=25)
@given(rung=st.sampled_from(RUNGS), order=st.permutations([2, 3, 4, 6, 9, 14, 22]))
def test_verdicts_that_are_shared_are_those_that_are_computed(rung: object, order: list[int]) -> None:
    """Whatever order the cards come in."""
    sizer, fields = Sizer(MODEL, Tally()), rung.fields(RTX_4090)  # type: ignore[attr-defined]
    setup = TrainSetup(model=CONFIG, micro_batch_size=2, seq_len=1024, **fields)
    for free_gib in order:
        here = machine(free_gib)
        expected = estimate(setup, here, MODEL)
        found = sizer.at("key", lambda: setup, here)
        assert (found.fit.verdict == "fits") == (expected.fit.verdict == "fits")
        assert found.fit.headroom_bytes == expected.fit.headroom_bytes
        assert sizer.with_odds(found, here).fit == expected.fit


def test_the_front_holds_what_nothing_beats_and_the_goals_are_on_it() -> None:
    found = {goal: optimise(question(goal=goal)) for goal in GOALS if goal != "longest-context"}
    front = found["fastest"].front
    points = [(o.wall_s.middle, o.money.middle, o.quality, o.doubts) for o in front]  # type: ignore[union-attr]
    for one, other in itertools.permutations(points, 2):
        assert not all(a <= b for a, b in zip(one, other, strict=True))
    assert pareto(front) == front
    fastest = found["fastest"].chosen
    assert fastest.wall_s.middle == min(point[0] for point in points)  # type: ignore[union-attr]
    assert found["best-quality"].chosen.quality == min(point[2] for point in points)
    dated = [o.money.middle for o in found["cheapest"].front if o.doubts == 0]  # type: ignore[union-attr]
    assert found["cheapest"].chosen.money.middle == min(dated)  # type: ignore[union-attr]


def test_an_undated_price_never_wins_over_a_dated_one() -> None:
    found = optimise(question())
    assert found.chosen.tier == 0
    assert any(option.tier > 0 for option in found.front), "but it is shown"


def test_what_needs_an_unknown_hosts_memory_comes_last() -> None:
    """Full fine-tuning would be the best quality, but only offloaded; with a host that is known to be large it is."""
    small = machine(2.5)
    assert (
        optimise(question(places=owned([small]), goal="best-quality")).chosen.estimate.setup.offload == "none"
    )
    tiny = replace(machine(1.0), host_bytes=64 * GIB)
    assert (
        optimise(question(places=owned([tiny]), goal="best-quality")).chosen.estimate.setup.offload != "none"
    )
    poor = replace(machine(1.0), host_bytes=GIB // 8)
    with pytest.raises(DoesNotFitError):
        optimise(question(places=owned([poor]), wishes={"model": CONFIG, "offload": "params+optimizer"}))


def test_limits_hold_and_what_breaks_them_says_by_how_much() -> None:
    free = optimise(question(goal="fastest")).chosen
    assert free.money is not None
    assert free.money.high > 1
    budget = Money(low=1.0, high=1.0, currency="USD")
    held = optimise(question(goal="fastest", limits=Limits(budget=budget)))
    assert held.chosen.money.high <= budget.high  # type: ignore[union-attr]
    assert all(option.money.high <= budget.high for option in held.front)  # type: ignore[union-attr]
    over = [out for out in held.out if out.over_money is not None]
    assert over
    assert all("over the budget by" in out.reason for out in over)


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        (Limits(budget=Money(low=1e-3, high=1e-3, currency="USD")), "budget"),
        (Limits(deadline_s=1.0), "deadline"),
    ],
)
def test_limits_that_nothing_meets_name_the_nearest(limits: Limits, word: str) -> None:
    with pytest.raises(LimitError, match=rf"{word}.*nearest is .*over") as caught:
        optimise(question(limits=limits))
    assert caught.value.exit_code == 3


def test_what_does_not_fit_says_what_it_needs_and_lacks() -> None:
    with pytest.raises(DoesNotFitError, match=r"needs .* GiB, .* over") as caught:
        optimise(question(places=owned([machine(0.5)])))
    assert caught.value.short_by_bytes > 0
    found = optimise(question(places=owned([machine(2)]), goal="best-quality"))
    misses = [out for out in found.out if out.short_by_bytes is not None]
    assert misses
    assert all("over" in out.reason or "tight" in out.reason for out in misses)


def test_the_longest_context_is_the_longest() -> None:
    here = machine(6)
    found = optimise(question(places=owned([here]), goal="longest-context")).chosen.estimate
    assert found.fit.verdict == "fits"
    assert found.setup.seq_len > LENGTHS.longest
    if found.setup.seq_len < MODEL.max_positions:  # type: ignore[operator]
        longer = found.setup.with_(seq_len=found.setup.seq_len + 128)
        assert estimate(longer, here, MODEL).fit.verdict != "fits"


def test_rows_are_cut_only_where_they_must_be() -> None:
    long = DataLengths.of([200] * 97 + [8000] * 3, num_rows=100, source="made up")
    asked = {"method": "full", "weights_dtype": "bfloat16", "model": CONFIG, "packing": False}
    roomy = optimise(question(places=owned([machine(40)]), lengths=long, wishes=asked)).chosen
    assert roomy.quality.lost_share == 0
    for tenths in range(80, 10, -5):
        try:
            found = optimise(
                question(places=owned([machine(tenths / 10)]), lengths=long, wishes=asked)
            ).chosen
        except DoesNotFitError:
            pytest.fail("no memory was found at which only shorter rows fit")
        if found.quality.lost_share:
            assert found.estimate.setup.seq_len == 256
            assert found.quality.lost_share == long.share_lost(256)
            return


def test_wishes_hold_and_leave_the_rest_open() -> None:
    wishes = {"model": CONFIG, "optimizer": "adafactor", "checkpointing": "full", "micro_batch_size": 2}
    setup = optimise(question(wishes=wishes)).chosen.estimate.setup
    assert {name: getattr(setup, name) for name in wishes} == wishes
    only = list(rungs({"method": "qlora", "quant": "nf4"}, find_gpu("rtx-4090")))
    assert [rung.method for rung in only] == ["qlora"]


def test_the_rank_follows_the_data() -> None:
    few = filling_rank(MODEL, "lora", "all-linear", LENGTHS, 1.0)
    many = filling_rank(MODEL, "lora", "all-linear", replace(LENGTHS, num_rows=10**5), 1.0)
    assert (few, filling_rank(MODEL, "lora", "all-linear", None, 1.0)) == (16, 16)
    assert many in RANKS
    assert many > few


def test_large_models_get_the_lower_rate() -> None:
    from planner.resolve import resolve_model

    setup = TrainSetup(model="llama-3.3-70b", method="lora")
    assert rates_for(setup, resolve_model("llama-3.3-70b"))["learning_rate"] == 1e-4
    assert rates_for(setup, MODEL) == {}
    assert rates_for(setup.with_(learning_rate=3e-4), resolve_model("llama-3.3-70b")) == {}


def test_durations_have_a_unit() -> None:
    assert [parse_duration("--deadline", text) for text in ("8h", "90min", "2 d")] == [28_800, 5400, 172_800]
    for wrong in ("8", "h", "-1h", "0h", "8 weeks"):
        with pytest.raises(UsageError, match="--deadline"):
            parse_duration("--deadline", wrong)


def test_places_are_narrowed_down() -> None:
    book = PriceBook(offers=(*OFFERS, offer(NAMES[1], 1.0, num_gpus=4)), clouds={})
    counts = {(p.machine.gpu.name, p.machine.num_gpus) for p in rented(book, TODAY, gpus=["RTX 4090"])}
    assert counts == {("RTX 4090", 1), ("RTX 4090", 4)}
    [only] = rented(book, TODAY, providers=["Cloud-9"])
    assert only.num_ways == 1
    assert Place(machine=machine(), is_owned=True).num_ways == 1


@pytest.fixture
def finefit(capsys, tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

    def call(*words: str, session: Session | None = None):  # type: ignore[no-untyped-def]
        code = run(words, session or Session())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_plan_searches_where_it_is_asked_to(finefit) -> None:  # type: ignore[no-untyped-def]
    words = (
        "plan",
        "smollm2-135m",
        "--gpu",
        "rtx-4090:1",
        "--cloud",
        "--tokens",
        "1e7",
        "--budget",
        "150cny",
    )
    code, out, _ = finefit(*words, "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["cost"]["currency"] == "CNY"
    assert answer["cost"]["high"] <= 150
    assert answer["searched"]["setups"] > answer["searched"]["sized"]
    assert {point["gpu"] for point in answer["front"]} == {"RTX 4090"}
    assert Path("plan.yaml").exists()
    code, out, _ = finefit(*words)
    assert code == 0
    assert "Nothing beats these" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--cloud", "--gpu", "t4", "--tokens", "1e9", "--budget", "0.01usd"), 3, "nearest is"),
        (("--cloud", "--budget", "20usd"), 2, "--data, --tokens"),
        (("--gpu", "rtx-4090", "--goal", "cheapest"), 2, "--data, --tokens"),
        (("--cloud", "--local-only"), 2, "--local-only"),
        ((), 2, "which GPU"),
        (("--gpu", "rtx-4090", "--budget", "20", "--tokens", "1e6"), 2, "currency"),
        (("--gpu", "rtx-4090", "--budget", "20xyz", "--tokens", "1e6"), 2, "XYZ"),
        (("--gpu", "rtx-4090", "--deadline", "8", "--tokens", "1e6"), 2, "unit"),
        (("--cloud", "--num-nodes", "2", "--num-gpus", "8", "--tokens", "1e6"), 2, "single machines"),
        (("--provider", "nobody", "--tokens", "1e6"), 3, "no machine is left"),
    ],
)
def test_wrong_words_are_one_line(finefit, words, code, message) -> None:  # type: ignore[no-untyped-def]
    found, out, err = finefit("plan", "smollm2-135m", *words)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("plan.yaml").exists()


def test_a_licence_that_forbids_it_is_no_plan(finefit) -> None:  # type: ignore[no-untyped-def]
    code, _, err = finefit("plan", "aya-23-8b", "--gpu", "rtx-4090", "--license", "commercial")
    assert code == 3
    assert "cc-by-nc" in err
    assert finefit("plan", "smollm2-135m", "--gpu", "rtx-4090", "--license", "commercial")[0] == 0


def test_a_method_that_is_kept_is_never_quantised(finefit) -> None:  # type: ignore[no-untyped-def]
    here = machine(2)
    session = Session(local_machine=lambda: replace(here, is_local=True))
    small = ("plan", "qwen3-0.6b", "--local-only", "--seq-len", "1024")
    code, out, _ = finefit(*small, "--json", session=session)
    assert (code, json.loads(out)["setup"]["method"]) == (0, "qlora")
    assert finefit(*small, "--keep-method", session=session)[0] == 3
