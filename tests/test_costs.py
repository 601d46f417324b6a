"""Money: prices and their checks, currencies, the cost of renting and of owning, `finefit costs` as people use it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.cli import run
from planner.card_prices import price_range
from planner.catalog import find_gpu, gpus
from planner.cli_options import Session
from planner.cost import (
    CloudPrices,
    CloudTerms,
    OwnTerms,
    RentCost,
    Span,
    billed_time,
    break_even_hours,
    own_cost,
    rent_cost,
    wall_time,
)
from planner.cost_options import parse_by_card, parse_money, parse_rates, parse_span
from planner.costs import CostTable, CostWishes, box_power, cloud_terms, costs
from planner.errors import UnknownNameError, UsageError
from planner.estimate import estimate, resolve
from planner.index import raw_profiles
from planner.lengths import DataLengths
from planner.money import SHOWN_CURRENCIES, Money, Rates, shipped_rates
from planner.offers import Offer, parse_offer, parse_offers
from planner.price_book import PriceBook, best_offers, shipped_book, with_rows
from planner.price_checks import check_offers
from planner.price_dates import describe_date, first_day, is_old
from planner.render import display_width
from planner.render_costs import format_costs
from planner.run_length import length_by_plan, length_by_rows, length_by_tokens
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.tariffs import QUALITIES as TARIFF_QUALITIES
from planner.tariffs import SECTORS, WORLD, tariff
from planner.units import HOUR_S

TODAY = datetime.date(2026, 11, 22)
MODEL = "smollm2-135m"
RATES = Rates(per_eur={"EUR": 1.0, "USD": 1.25, "CNY": 7.5}, as_of="2026-10-30", source="a test")
ROW = {"provider": "aws", "gpu": "RTX 4090", "price": 1.0, "source": "a list", "as_of": "2026-11-01"}

Run = Callable[..., tuple[int, str, str]]


def offer(**changes: Any) -> Offer:
    return parse_offer({**ROW, **changes})


def terms(**changes: Any) -> CloudTerms:
    zero = Span(low=0.0, high=0.0)
    base: dict[str, Any] = {
        "setup_s": zero,
        "download_bytes": 0,
        "download_bytes_per_s": Span(low=1e6, high=1e6),
        "disk_bytes": 0,
        "egress_bytes": 0,
        "interruptions_per_s": zero,
    }
    return CloudTerms(**{**base, **changes})


def usd(low: float, high: float | None = None) -> Money:
    return Money(low=low, high=low if high is None else high, currency="USD")


# ------------------------------------------------------------- currencies

amounts = st.floats(0, 1e9)
currencies = st.sampled_from(sorted(shipped_rates().per_eur))


@settings(deadline=None)
@given(amounts, amounts, currencies, currencies)
def test_money_survives_a_round_trip_through_another_currency(
    a: float, b: float, home: str, away: str
) -> None:
    money = Money(low=min(a, b), high=max(a, b), currency=home)
    there = shipped_rates().convert(money, away)
    back = shipped_rates().convert(there, home)
    assert there.low <= there.high
    assert (back.low, back.high) == pytest.approx((money.low, money.high))


def test_rates_convert_both_ways_and_the_users_rate_wins() -> None:
    # 7.5 CNY and 1.25 USD for a euro: 6 CNY for a dollar
    assert RATES.convert(usd(10), "CNY").low == pytest.approx(60)
    mine = parse_rates(RATES, ["USD/CNY=7.0", "THB/USD=0.03"])
    assert mine.convert(usd(10), "CNY").low == pytest.approx(70)
    assert mine.convert(Money(low=100, high=100, currency="THB"), "USD").low == pytest.approx(3)


def test_a_currency_without_a_rate_is_an_error() -> None:
    with pytest.raises(UnknownNameError):
        RATES.convert(usd(1), "XAU")


@pytest.mark.parametrize("text", ["USD=7", "USD/CNY", "USD/CNY=-7", "USD/CNY=0", "USD/USD=1", "DOLLAR/CNY=7"])
def test_a_rate_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_rates(RATES, [text])


def test_amounts_of_two_currencies_are_never_added() -> None:
    with pytest.raises(ValueError, match="USD"):
        usd(1) + Money(low=1, high=1, currency="CNY")


# ------------------------------------------------------------- dates


@pytest.mark.parametrize(
    ("as_of", "shown", "old"),
    [
        ("2026-11-01", "2026-11-01", False),
        ("2026-10-01", "2026-10-01 (52 d old)", False),
        ("2026-Q2", "2026-Q2 (235 d old)", True),
        ("2025", "2025 (690 d old)", True),
        (None, "undated", True),
    ],
)
def test_prices_show_their_age(as_of: str | None, shown: str, old: bool) -> None:
    assert describe_date(as_of, TODAY) == shown
    assert is_old(as_of, TODAY) is old


# ------------------------------------------------------------- rows and their checks


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"price": -1.0}, "negative"),
        ({"price": "cheap"}, "price"),
        ({"price": [2.0, 1.0]}, "low end"),
        ({"price": True}, "price"),
        ({"gpu": "RTX 4091"}, "RTX 4090"),
        ({"num_gpus": 0}, "num_gpus"),
        ({"currency": "dollars"}, "currency"),
        ({"as_of": "yesterday"}, "as_of"),
        ({"quality": "great"}, "quality"),
        ({"prise": 1.0}, "nearest: price"),
        ({"source": ""}, "source"),
        ({"spot": "no"}, "spot"),
        ({"min_billing_s": -5}, "min_billing_s"),
        ({"provider": 7}, "provider"),
    ],
)
def test_a_broken_row_is_named_and_the_rest_is_used(change: dict[str, Any], says: str) -> None:
    good = ("here, offer 1", ROW)
    offers, faults = parse_offers([good, ("here, offer 2", {**ROW, **change})])
    assert len(offers) == 1
    (fault,) = faults
    assert fault.startswith("here, offer 2: ")
    assert says in fault


def test_a_price_of_zero_means_missing_and_never_free() -> None:
    kept, rejected = check_offers([offer(price=0.0, spot=True), offer(price=1.0)])
    assert [o.low for o in kept] == [1.0]
    assert "missing" in rejected[0].reason


def test_on_demand_below_spot_is_left_out() -> None:
    kept, rejected = check_offers(
        [offer(price=4.2), offer(price=5.3, spot=True), offer(price=9.8, region="x")]
    )
    assert [(o.low, o.is_spot) for o in kept] == [(5.3, True), (9.8, False)]
    assert "below spot" in rejected[0].reason


def test_a_missing_spot_price_says_nothing_about_on_demand() -> None:
    kept, _ = check_offers([offer(price=4.2), offer(price=0.0, spot=True)])
    assert [o.low for o in kept] == [4.2]


@pytest.mark.parametrize(("spot", "quality"), [(55.04, "suspect"), (5.504, "suspect"), (12.0, "ok")])
def test_a_spot_price_that_shows_no_market_is_suspect(spot: float, quality: str) -> None:
    kept, _ = check_offers([offer(price=55.04), offer(price=spot, spot=True)])
    assert [o.quality for o in kept] == ["ok", quality]


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("H100", "H100 80GB SXM5"),
        ("A100-80GB", "A100 80GB SXM4"),
        ("A100-40GB", "A100 40GB SXM4"),
        ("RTX PRO 6000", "RTX PRO 6000 Blackwell Server"),
        ("GH200", "GH200 96GB"),
    ],
)
def test_catalogue_names_mean_one_card(name: str, card: str) -> None:
    assert offer(gpu=name).gpu == card


# ------------------------------------------------------------- the shipped snapshot


def test_the_shipped_snapshot_is_whole_but_for_the_rows_that_the_checks_are_for() -> None:
    book = shipped_book()
    assert len(book.offers) > 400
    assert all("below spot" in fault and fault.startswith("gcp ") for fault in book.faults)
    assert {o.gpu for o in book.offers} <= set(gpus())
    assert all(o.low > 0 and o.source for o in book.offers)
    assert set(book.clouds) <= {o.provider for o in book.offers}


def test_no_shipped_date_lies_in_the_future() -> None:
    dates = [o.as_of for o in shipped_book().offers if o.as_of]
    assert all((first_day(text) or datetime.date.max) <= TODAY for text in dates)


def test_undated_and_old_prices_rank_below_dated_ones_and_doubtful_ones_last() -> None:
    assert offer().tier(TODAY) == 0
    assert offer(as_of="2026-01-01").tier(TODAY) == offer(as_of=None).tier(TODAY) == 1
    assert offer(quality="recall").tier(TODAY) == 1
    assert offer(basis="gpu-only").tier(TODAY) == 2
    assert offer(quality="conflict").tier(TODAY) == offer(quality="suspect").tier(TODAY) == 3


def test_the_newest_price_wins_and_the_cheapest_region_of_that_day() -> None:
    rows = [
        offer(price=1.0, as_of="2026-08-01", region="a"),
        offer(price=3.0, region="b"),
        offer(price=2.0, region="c"),
        offer(price=0.1, as_of=None, region="d"),
    ]
    (best,) = best_offers(rows, TODAY)
    assert (best.low, best.region) == (2.0, "c")


def test_conflicting_prices_become_a_range_with_both_sources() -> None:
    rows = [
        offer(price=32.0, quality="conflict"),
        offer(price=40.0, quality="conflict", source="b", as_of=None),
    ]
    (best,) = best_offers(rows, TODAY)
    assert (best.low, best.high, best.as_of) == (32.0, 40.0, None)
    assert "a list" in best.source
    assert "b" in best.source


# ------------------------------------------------------------- tariffs


def test_a_country_s_tariff_has_date_and_source() -> None:
    found = tariff("de", RATES, "EUR")
    # EU statistics as printed in the spring of 2026: 0.384 EUR for households
    assert (found.per_kwh.low, found.per_kwh.high, found.as_of) == (0.384, 0.384, "2026-03")
    assert found.source


def test_doubtful_tariffs_become_a_range() -> None:
    rates = shipped_rates()
    found = tariff("KR", rates, "USD")
    assert found.quality != "ok"
    assert found.per_kwh.low < found.per_kwh.high


@pytest.mark.parametrize(
    "row", raw_profiles("prices")["electricity"]["tariffs"], ids=lambda row: row["country"]
)
def test_every_country_is_found_in_any_case(row: dict[str, Any]) -> None:
    if row["currency"] in shipped_rates().per_eur:
        found = tariff(row["country"].swapcase(), shipped_rates(), "EUR", row["sector"])
        assert found.country == row["country"]
        assert 0 < found.per_kwh.low <= found.per_kwh.high < 1


def test_an_unknown_country_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError):
        tariff("DEE", RATES, "USD")


# ------------------------------------------------------------- renting, by hand


def test_rent_by_hand() -> None:
    # 1 h of training + 0.5 h of setting up + 3.6 GB at 1 MB/s = 1 h: 2.5 h, billed by the minute, 3 USD an hour
    # 100 GB for 2.5 of 730 h at 0.073 USD = 0.025; 150 GB out: 50 GB paid, or 150 if the free 100 GB are gone
    prices = CloudPrices(
        disk_usd_per_gb_month=0.073,
        egress_free_gb=100,
        egress=((0, 0.1),),
        min_billing_s=60,
        billing_step_s=60,
    )
    needs = terms(
        setup_s=Span(low=1800, high=1800),
        download_bytes=int(3.6e9),
        disk_bytes=int(100e9),
        egress_bytes=int(150e9),
    )
    cost = rent_cost(offer(price=3.0), Span(low=3600, high=3600), needs, prices, RATES, "USD")
    assert cost.billed_s == Span(low=9000, high=9000)
    assert cost.parts["machine"] == usd(7.5)
    assert cost.parts["storage"] is not None
    assert cost.parts["storage"].low == pytest.approx(0.025)
    assert cost.parts["egress"] == usd(5.0, 15.0)
    assert cost.total is not None
    assert (cost.total.low, cost.total.high) == pytest.approx((12.525, 22.525))


def test_spot_repeats_what_interruptions_cost() -> None:
    # 10 h; one interruption in 10 h; each costs half of the 2 h between checkpoints and a start of 1 h: 2 h.
    # W = 10 / (1 - 0.1 x 2) = 12.5 h, and the first start
    needs = terms(
        setup_s=Span(low=3600, high=3600),
        interruptions_per_s=Span(low=0.0, high=0.1 / 3600),
        checkpoint_s=7200,
    )
    run_s = Span(low=36_000, high=36_000)
    assert wall_time(run_s, needs, is_spot=False) == Span(low=39_600, high=39_600)
    spot = wall_time(run_s, needs, is_spot=True)
    assert spot is not None
    assert (spot.low, spot.high) == pytest.approx((39_600, 48_600))


def test_a_spot_run_that_never_ends_has_no_total() -> None:
    needs = terms(setup_s=Span(low=3600, high=3600), interruptions_per_s=Span(low=0.0, high=1 / 3600))
    cost = rent_cost(offer(spot=True), Span(low=3600, high=3600), needs, CloudPrices(), RATES, "USD")
    assert cost.total is None
    assert "machine" in cost.unknown


def test_the_minimum_is_billed_and_an_unknown_step_reaches_up_to_an_hour() -> None:
    short = Span(low=10, high=10)
    assert billed_time(short, CloudPrices(min_billing_s=60, billing_step_s=1)) == Span(low=60, high=60)
    assert billed_time(short, CloudPrices()) == Span(low=10, high=3600)


def test_several_boxes_cost_as_many_times() -> None:
    one = rent_cost(offer(), Span(low=3600, high=3600), terms(), CloudPrices(), RATES, "USD")
    two = rent_cost(offer(), Span(low=3600, high=3600), terms(), CloudPrices(), RATES, "USD", num_boxes=2)
    assert two.hourly == one.hourly.times(2)


positive = st.floats(1.0, 1e6)
spans = st.tuples(positive, positive).map(lambda pair: Span(low=min(pair), high=max(pair)))


@settings(deadline=None)
@given(spans, st.floats(1.0, 10.0), st.booleans(), spans)
def test_a_longer_run_never_costs_less(run_s: Span, factor: float, spot: bool, setup_s: Span) -> None:
    needs = terms(setup_s=setup_s, interruptions_per_s=Span(low=0.0, high=1e-7), checkpoint_s=600)
    prices = CloudPrices(disk_usd_per_gb_month=0.1, egress=((0, 0.1),))

    def total(seconds: Span) -> Money:
        found = rent_cost(offer(spot=spot), seconds, needs, prices, RATES, "USD").total
        assert found is not None
        assert 0 <= found.low <= found.high
        return found

    longer = Span(low=run_s.low * factor, high=run_s.high * factor)
    assert total(longer).low >= total(run_s).low * (1 - 1e-9)
    assert total(longer).high >= total(run_s).high * (1 - 1e-9)


@settings(deadline=None)
@given(
    st.none() | spans,
    st.none() | st.just(((0, 0.1),)),
    st.none() | st.just(0.1),
    st.sampled_from(["instance", "gpu-only"]),
)
def test_what_is_unknown_is_named_and_never_zero(
    run_s: Span | None, egress: Any, disk: float | None, basis: str
) -> None:
    prices = CloudPrices(disk_usd_per_gb_month=disk, egress=egress)
    needs = terms(disk_bytes=10**9, egress_bytes=10**9)
    cost: RentCost = rent_cost(offer(basis=basis), run_s, needs, prices, RATES, "USD")
    unknown = {
        "machine": run_s is None,
        "storage": disk is None or run_s is None,
        "egress": egress is None,
        "host": basis == "gpu-only",
    }
    assert set(cost.unknown) == {name for name, is_unknown in unknown.items() if is_unknown}
    assert (cost.total is None) == (run_s is None)
    assert all(money is None or money.low > 0 for money in cost.parts.values())
    assert cost.to_json()["is_lower_bound"] == (cost.total is not None and bool(cost.unknown))


# ------------------------------------------------------------- owning, by hand


def test_owning_by_hand() -> None:
    # 500 W at 0.30 USD: 0.15 USD an hour; 1600 - 700 USD over 3000 h: 0.30 USD an hour; 10 h
    mine = OwnTerms(
        box_w=Span(low=500, high=500), per_kwh=usd(0.30), purchase=usd(1600), resale=usd(700), hours=3000
    )
    cost = own_cost(mine, Span(low=36_000, high=36_000), RATES, "USD")
    assert cost.electricity is not None
    assert cost.electricity.low == pytest.approx(1.5)
    assert cost.total_bought is not None
    assert cost.total_bought.low == pytest.approx(4.5)
    assert cost.loss is not None
    assert cost.electricity_hourly is not None
    # 900 USD over 0.60 - 0.15 USD saved in each hour
    assert break_even_hours(cost.loss, usd(0.60), cost.electricity_hourly) == pytest.approx((2000, 2000))


def test_what_is_unknown_of_the_own_card_stays_unknown() -> None:
    cost = own_cost(OwnTerms(box_w=None, per_kwh=None), Span(low=1, high=1), RATES, "USD")
    assert (cost.electricity, cost.wear, cost.total_bought, cost.loss) == (None, None, None, None)
    bought = own_cost(OwnTerms(box_w=None, per_kwh=None, purchase=usd(1000)), None, RATES, "USD")
    assert (bought.wear, bought.total_bought, bought.loss) == (None, None, usd(1000))


def test_buying_never_pays_where_renting_costs_less_than_the_electricity() -> None:
    assert break_even_hours(usd(1000), usd(0.10), usd(0.20)) is None
    assert break_even_hours(usd(1000), usd(0.10, 0.30), usd(0.20)) == (pytest.approx(10_000), None)


@settings(deadline=None)
@given(spans, spans, spans)
def test_break_even_ranges_are_ordered(loss: Span, rent: Span, power: Span) -> None:
    found = break_even_hours(usd(loss.low, loss.high), usd(rent.low, rent.high), usd(power.low, power.high))
    assert found is None or found[1] is None or 0 <= found[0] <= found[1]


@pytest.mark.parametrize(
    ("gpu", "currency", "kind", "low", "high"),
    [
        # two pages of 2026 contradict each other: 2,100-2,400 and 3,500-4,000
        ("rtx-5090", "USD", "street", 2100, 4000),
        # used in 2026 is newer than the list price of 2022 and a shop's price of 2023
        ("rtx-4090", "USD", "used", 1200, 1500),
        ("rtx-3090", "USD", "used", 500, 1000),
    ],
)
def test_a_card_costs_what_the_newest_kind_of_price_says(
    gpu: str, currency: str, kind: str, low: float, high: float
) -> None:
    found = price_range(find_gpu(gpu), currency)
    assert found is not None
    assert (found.kind, found.low, found.high) == (kind, low, high)
    assert found.source


def test_an_owned_card_has_no_price_and_no_break_even() -> None:
    wishes = CostWishes(is_owned=True, tariff=tariff("DE", RATES, "USD"), seconds={"any": HOUR_S})
    found = table(book({}), wishes)
    assert found.own.loss is None
    assert found.own.electricity is not None
    assert found.rows[0].break_even is None


def test_power_at_the_wall_by_hand() -> None:
    # (2 x 450 + 100..150) W / 0.94..0.90
    two = box_power(Machine(gpu=find_gpu("rtx-4090"), num_gpus=2))
    assert two is not None
    assert (two.low, two.high) == pytest.approx((1000 / 0.94, 1050 / 0.90))
    # two boxes have two rests
    boxes = box_power(Machine(gpu=find_gpu("rtx-4090"), num_gpus=2), 2)
    assert boxes is not None
    assert boxes.low == pytest.approx(1100 / 0.94)


def test_what_goes_home_is_what_was_trained() -> None:
    setup = TrainSetup(model=MODEL, method="full", weights_dtype="bfloat16", max_steps=1)
    model = resolve(setup)
    here = estimate(setup, Machine(gpu=find_gpu("rtx-4090")), model)
    needs = cloud_terms(here, model, CostWishes())
    assert needs.egress_bytes == needs.download_bytes == 2 * model.num_params
    assert needs.disk_bytes > needs.egress_bytes


@pytest.mark.parametrize(
    "row", raw_profiles("prices")["electricity"]["tariffs"], ids=lambda row: row["country"]
)
def test_a_tariff_row_is_whole(row: dict[str, Any]) -> None:
    assert row["price_per_kwh"] > 0
    assert row["quality"] in TARIFF_QUALITIES
    assert row["sector"] in SECTORS
    assert row["source"].strip()
    assert "as_of" not in row or first_day(row["as_of"])
    assert "as_of" in row or row["quality"] != "ok"


def test_a_cloud_s_prices_are_whole_and_ordered() -> None:
    for cloud in raw_profiles("prices")["clouds"]["clouds"].values():
        assert cloud["disk_usd_per_gb_month"] > 0
        ends = [end or float("inf") for end, _ in cloud["egress"]]
        assert ends == sorted(ends)
        assert ends[-1] == float("inf")
        assert all(first_day(cloud[key]) for key in ("disk_as_of", "egress_as_of"))


# ------------------------------------------------------------- the run's length


def test_steps_by_hand() -> None:
    setup = TrainSetup(model=MODEL, micro_batch_size=2, grad_accum_steps=4, seq_len=512, epochs=2)
    # 1000 rows, 50 held out, 950 over 8 a step: 119 steps an epoch
    rows = length_by_rows(setup, 1000)
    assert (rows.low_steps, rows.high_steps) == (238, 238)
    packed = length_by_rows(setup.with_(packing=True), 1000, mean_tokens=128)
    # a quarter of a sequence each: 238 sequences, 30 steps
    assert (packed.low_steps, packed.high_steps) == (60, 238)
    assert length_by_tokens(setup, 1_000_000).high_steps == 245
    planned = length_by_plan(setup.with_(max_steps=7))
    assert planned is not None
    assert planned.high_steps == 7
    assert length_by_plan(setup) is None


# ------------------------------------------------------------- options


def test_options_say_amounts_ranges_and_cards() -> None:
    assert parse_money("--card-price", "1200-1500 usd", RATES) == usd(1200, 1500)
    assert parse_span("--setup-minutes", "5", 60) == Span(low=300, high=300)
    own = "RTX 4090"
    assert parse_by_card("--hours", ["2", "h100-sxm=1", "any=3"], own) == {
        own: 2,
        "H100 80GB SXM5": 1,
        "any": 3,
    }


@pytest.mark.parametrize("text", ["-5USD", "USD", "5", "9-3USD", "1e3USD"])
def test_amounts_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_money("--tariff", text, RATES)


# ------------------------------------------------------------- the table


def table(
    book: PriceBook, wishes: CostWishes | None = None, gpu: str = "rtx-4090", **fields: Any
) -> CostTable:
    setup = TrainSetup.from_dict({"model": MODEL, "max_steps": 100, **fields})
    machine = Machine(gpu=find_gpu(gpu), num_gpus=setup.num_gpus)
    return costs(
        setup,
        machine,
        resolve(setup),
        book=book,
        rates=RATES,
        wishes=wishes or CostWishes(),
        length=length_by_plan(setup),
        today=TODAY,
    )


def book(*rows: dict[str, Any]) -> PriceBook:
    return with_rows(
        PriceBook(offers=(), clouds={}), [(f"row {i}", {**ROW, **row}) for i, row in enumerate(rows)]
    )


def test_cards_that_are_too_small_or_can_t_run_it_are_named() -> None:
    found = table(
        book({}, {"gpu": "RTX 3080 Ti"}, {"gpu": "T4"}),
        model="llama-3.1-8b",
        method="lora",
    )
    assert found.too_small == ("RTX 3080 Ti",)
    assert list(found.refused) == ["T4"]
    assert {row.offer.gpu for row in found.rows} == {"RTX 4090"} or found.rows == ()


def test_the_smallest_instance_with_enough_cards_is_taken() -> None:
    offers = book({"num_gpus": 1}, {"num_gpus": 4, "price": 4.0}, {"num_gpus": 8, "price": 8.0})
    (row,) = table(offers, num_gpus=2, sharding="ddp").rows
    assert row.offer.num_gpus == 4


@pytest.fixture
def timeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows any card's rates."""
    monkeypatch.setattr("planner.timing.rates_of", lambda machine, setup: None)


@pytest.mark.usefixtures("timeless")
def test_an_unknown_time_leaves_the_price_per_hour_and_no_total() -> None:
    (row,) = table(book({"gpu": "RTX A4000"})).rows
    assert row.run_s is None
    assert row.cost.total is None
    assert row.cost.hourly.low == 1.0
    said = CostWishes(seconds={"RTX A4000": HOUR_S})
    (row,) = table(book({"gpu": "RTX A4000"}), said).rows
    assert row.cost.total is not None


def test_a_measured_speed_gives_the_time() -> None:
    # 100 steps of 1 x 512 positions at 512 a second
    (row,) = table(book({}), CostWishes(tokens_per_s={"any": 512.0}), seq_len=512).rows
    assert row.run_s == Span(low=100, high=100)


@pytest.mark.usefixtures("timeless")
def test_dated_offers_come_before_old_ones_and_known_totals_before_unknown() -> None:
    offers = book(
        {"provider": "old", "as_of": "2024", "price": 0.1},
        {"provider": "new", "price": 2.0},
        {"provider": "timeless", "gpu": "RTX A4000", "price": 0.2},
        {"provider": "doubtful", "price": 0.1, "quality": "suspect"},
    )
    found = table(offers, CostWishes(seconds={"RTX 4090": HOUR_S}))
    assert [row.offer.provider for row in found.rows] == ["new", "timeless", "old", "doubtful"]


def test_spot_offers_can_be_left_out() -> None:
    offers = book({}, {"spot": True, "price": 0.5})
    assert len(table(offers).rows) == 2
    assert [row.offer.is_spot for row in table(offers, CostWishes(with_spot=False)).rows] == [False]


def test_a_card_that_can_t_run_the_plan_costs_nothing_it_could_say() -> None:
    found = table(book({"gpu": "H100"}), gpu="rtx-3060-12gb", model="llama-3.1-8b", method="full")
    assert found.estimate.fit.verdict == "does-not-fit"
    assert found.own.electricity is None
    assert all(row.break_even is None for row in found.rows)


def test_an_offer_in_a_currency_without_a_rate_is_named() -> None:
    found = table(book({}, {"provider": "b", "currency": "TWD"}))
    assert [row.offer.provider for row in found.rows] == ["aws"]
    assert any("TWD" in fault for fault in found.faults)


@pytest.mark.parametrize("currency", SHOWN_CURRENCIES)
def test_every_amount_of_the_answer_is_in_the_currency_asked_for(currency: str) -> None:
    wishes = CostWishes(currency=currency, tariff=tariff(WORLD, RATES, currency), seconds={"any": HOUR_S})
    answer = table(replace(shipped_book(), faults=()), wishes).to_json()["cost"]
    shown = [row["cost"]["total"]["currency"] for row in answer["offers"]]
    assert set(shown) == {currency}
    assert answer["own"]["electricity"]["currency"] == currency


# ------------------------------------------------------------- the command


@pytest.fixture
def finefit(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: str, session: Session | None = None) -> tuple[int, str, str]:
        code = run(arguments, session)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_costs_of_a_model_and_of_a_plan_agree(finefit: Run) -> None:
    fields = ("--gpu", "rtx-4090", "--method", "qlora", "--max-steps", "50")
    assert finefit("plan", MODEL, *fields)[0] == 0
    code, out, _ = finefit("costs", "plan.yaml", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["cost"]["steps"] == [50, 50]
    assert answer["cost"]["offers"]
    again = json.loads(finefit("costs", "plan.yaml", "--json", "--max-steps", "100")[1])
    assert again["cost"]["steps"] == [100, 100]


def test_the_table_shows_dates_sources_and_what_is_unknown(finefit: Run) -> None:
    code, out, err = finefit(
        "costs", MODEL, "--gpu", "rtx-4090", "--tokens", "1e6", "--country", "CN", "--currency", "cny"
    )
    assert (code, err) == (0, "")
    for words in ("CNY/h", "already owned", "bought for it", "price of", "[1]", "Exchange rates", "unknown"):
        assert words in out


@pytest.mark.parametrize("width", [72, 100, 140])
@pytest.mark.parametrize("show_all", [True, False])
def test_no_line_is_wider_than_the_terminal(width: int, show_all: bool) -> None:
    wishes = CostWishes(tariff=tariff("DE", RATES, "USD"), seconds={"RTX 4090": HOUR_S}, hours=1500)
    text = format_costs(table(shipped_book(), wishes), width, show_all=show_all)
    assert max(map(display_width, text.splitlines())) <= width


def test_the_steps_come_from_the_data(finefit: Run) -> None:
    Path("rows.jsonl").write_text('{"text": "a row"}\n' * 100)
    _, out, _ = finefit(
        "costs", MODEL, "--gpu", "rtx-4090", "--data", "rows.jsonl", "--objective", "pretrain", "--json"
    )
    assert json.loads(out)["cost"]["steps"] == [95, 95]


def test_packed_rows_are_between_perfect_packing_and_none(finefit: Run) -> None:
    Path("rows.jsonl").write_text('{"text": "a row"}\n' * 100)
    lengths = DataLengths(num_rows=100, mean=512, p50=512, p99=512, longest=512, source="a test")
    session = Session(token_lengths=lambda fields: (lengths, None))
    words = (
        "costs",
        MODEL,
        "--gpu",
        "rtx-4090",
        "--data",
        "rows.jsonl",
        "--packing",
        "--seq-len",
        "2048",
        "--json",
    )
    # 95 rows of a quarter of a sequence: 24 sequences at best
    assert json.loads(finefit(*words, session=session)[1])["cost"]["steps"] == [24, 95]
    without = json.loads(finefit(*words, session=Session())[1])["cost"]
    assert without["steps"] == [1, 2], "five characters are a token or two"
    assert "estimated" in without["steps_source"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--currency", "GBP"), "unknown currency"),
        (("--country", "XX"), "unknown country"),
        (("--card-price", "-5USD"), "--card-price"),
        (("--tariff", "0.3"), "--tariff"),
        (("--tariff", "0.3EUR", "--country", "DE"), "give one of them"),
        (("--hours", "0"), "--hours"),
        (("--hours", "rtx-4091=2"), "rtx-4091"),
        (("--rate", "USD/CNY=x"), "--rate"),
        (("--download-mb-s", "0"), "--download-mb-s"),
        (("--setup-minutes", "20-5"), "--setup-minutes"),
        (("--data", "no.jsonl"), "no.jsonl"),
    ],
)
def test_bad_options_are_one_line(finefit: Run, words: tuple[str, ...], says: str) -> None:
    code, out, err = finefit("costs", MODEL, "--gpu", "rtx-4090", *words)
    assert code in (1, 2)
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
