"""`fits` and `needs`: what a table says holds for the single estimates that it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.card_prices import card_price
from planner.catalog import find_gpu, gpus
from planner.errors import SetupError, UnknownNameError, UsageError
from planner.estimate import estimate
from planner.fits import (
    LICENSES,
    MAX_MICRO_BATCH,
    METHODS,
    MODELS,
    SEQ_LEN,
    SEQ_LEN_STEP,
    FitsRow,
    fits,
    largest,
    table_models,
)
from planner.needs import COUNTS, needs
from planner.render import display_width
from planner.render_tables import format_fits, format_needs
from planner.resolve import resolve_model
from planner.setup import TrainSetup
from planner.specs import Machine

SOME = ("smollm2-135m", "qwen3-1.7b", "llama-3.1-8b")


def machine(name: str, count: int = 1) -> Machine:
    return Machine(gpu=find_gpu(name), num_gpus=count)


def fits_at(row: FitsRow, where: Machine, batch: int, seq_len: int) -> bool:
    assert row.estimate is not None
    setup = row.estimate.setup.with_(micro_batch_size=batch, seq_len=seq_len)
    return estimate(setup, where, row.model).fit.verdict == "fits"


@given(st.integers(0, 3000), st.integers(1, 2000))
def test_largest_finds_the_edge(edge: int, cap: int) -> None:
    assert largest(lambda n: n <= edge, cap) == min(edge, cap)


@pytest.mark.parametrize(
    "where", [machine("rtx-4090"), machine("rtx-3060-12gb"), machine("a100-80gb-sxm", 2)]
)
def test_longest_and_largest_are_the_edges_of_what_fits(where: Machine) -> None:
    table = fits(where, models=table_models(SOME))
    assert [row.method for row in table.rows] == [*METHODS] * len(SOME)
    for row in table.rows:
        longest, batch = row.longest_seq_len, row.largest_micro_batch_size
        if longest:
            assert fits_at(row, where, 1, longest)
        if not row.is_longest_models_limit:
            assert not fits_at(row, where, 1, longest + SEQ_LEN_STEP)
        if batch:
            assert fits_at(row, where, batch, SEQ_LEN)
        if batch < MAX_MICRO_BATCH:
            assert not fits_at(row, where, batch + 1, SEQ_LEN)


def test_a_row_is_the_estimate_of_its_setup() -> None:
    where = machine("l40")
    for row in fits(where, models=table_models(SOME), fields={"seq_len": 512, "rank": 64}).rows:
        assert row.estimate is not None
        assert row.estimate == estimate(row.estimate.setup, where, row.model)
        assert (row.estimate.setup.seq_len, row.estimate.setup.rank) == (512, 64)


def test_models_come_by_size_and_the_default_ones_exist() -> None:
    table = fits(machine("h100-80gb-sxm5"))
    sizes = [row.model.num_params for row in table.rows]
    assert len(table.rows) == len(MODELS) * len(METHODS)
    assert sizes == sorted(sizes)
    assert sizes[0] < 2e8
    assert sizes[-1] > 6e10


def test_a_card_without_bfloat16_gets_a_recipe_that_it_can_run() -> None:
    for row in fits(machine("rtx-2080-ti"), models=table_models(SOME)).rows:
        assert row.problem is None
        assert row.estimate is not None
        assert "bfloat16" not in (row.estimate.setup.weights_dtype, row.estimate.setup.autocast)


def test_what_is_not_modelled_has_no_number() -> None:
    table = fits(machine("tpu-v5e"), models=table_models(SOME[:1]))
    for row in table.rows:
        assert (row.estimate, row.is_modelled) == (None, False)
        assert "memory" not in row.to_json()
    text = format_fits(table)
    assert text.count("not modelled") >= len(METHODS)
    assert "GiB free" not in text


def test_a_method_that_the_card_can_not_run_is_one_row_not_the_tables_end() -> None:
    without = replace(find_gpu("rtx-4090"), bitsandbytes=False)
    rows = fits(Machine(gpu=without), models=table_models(SOME[:1])).rows
    assert [row.problem is None for row in rows] == [True, True, False]


def test_quantisation_is_for_the_methods_that_quantise() -> None:
    rows = fits(machine("rtx-4090"), models=table_models(SOME[:1]), fields={"quant": "int8"}).rows
    assert [r.estimate.setup.quant for r in rows if r.estimate] == [None, None, "int8"]


def test_fields_that_are_wrong_everywhere_are_an_error() -> None:
    models = table_models(SOME[:1])
    with pytest.raises(SetupError, match="targets"):
        fits(machine("rtx-4090"), models=models, methods=("lora",), fields={"targets": ("nothing",)})
    with pytest.raises(UnknownNameError, match="method"):
        fits(machine("rtx-4090"), models=models, methods=("lorra",))
    with pytest.raises(UsageError, match="no model is left"):
        fits(machine("rtx-4090"), models={})


def test_lengths_stop_at_the_models_own_limit() -> None:
    models = table_models(["gpt2"])
    row = fits(machine("a100-80gb-sxm"), models=models, methods=("lora",), fields={"seq_len": 4096}).rows[0]
    assert row.estimate is not None
    assert row.estimate.setup.seq_len == row.model.max_positions == row.longest_seq_len
    assert row.is_longest_models_limit


def test_commercial_leaves_out_what_the_licence_forbids() -> None:
    names = ["smollm2-135m", "llama-3.1-8b", "c4ai-command-r-v01"]
    allowed = [LICENSES["commercial"](model) for model in table_models(names).values()]
    assert allowed == [True, True, False]


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-8b", "bert-base-uncased"])
def test_needs_names_the_fewest_cards_that_fit(name: str) -> None:
    model = resolve_model(name)
    table = needs(name, model)
    for method, rows in table.rows.items():
        for row in rows[::7]:
            assert row.setup.method == method
            assert estimate(row.setup, row.machine, model).fit == row.fit
            assert row.fit.verdict == "fits"
            assert row.setup.num_gpus == row.machine.num_gpus
            if row.machine.num_gpus > 1:
                fewer = COUNTS[COUNTS.index(row.machine.num_gpus) - 1]
                smaller = Machine(gpu=row.machine.gpu, num_gpus=fewer)
                sharding = row.setup.sharding if fewer > 1 else "none"
                setup = row.setup.with_(num_gpus=fewer, sharding=sharding)
                assert estimate(setup, smaller, model).fit.verdict != "fits"


def test_needs_accounts_for_every_card() -> None:
    name = "llama-3.1-8b"
    table = needs(name, resolve_model(name))
    for method in METHODS:
        found = {row.machine.gpu.name for row in table.rows[method]}
        groups = (found, set(table.too_small[method]), set(table.refused[method]), set(table.not_modelled))
        assert set().union(*groups) == set(gpus())
        assert sum(map(len, groups)) == len(gpus())


@pytest.mark.parametrize("currency", ["USD", "CNY"])
def test_needs_goes_from_the_cheapest_up_with_unknown_prices_last(currency: str) -> None:
    name = "qwen3-1.7b"
    for rows in needs(name, resolve_model(name), currency=currency).rows.values():
        totals = [row.total_price for row in rows]
        known = [total for total in totals if total is not None]
        assert totals == sorted(known) + [None] * (len(totals) - len(known))
        for row in rows:
            price = card_price(row.machine.gpu, currency)
            assert row.price == price
            if price is not None:
                assert price.currency == currency
                assert row.total_price == row.machine.num_gpus * price.middle


def test_needs_refuses_fields_that_no_card_can_run() -> None:
    with pytest.raises(SetupError, match="targets"):
        needs("smollm2-135m", resolve_model("smollm2-135m"), methods=("lora",), fields={"targets": ("x",)})


@given(st.integers(60, 160))
@settings(max_examples=10, deadline=None)
def test_tables_stay_inside_the_terminal(width: int) -> None:
    model = resolve_model("llama-3.1-8b")
    table = fits(machine("rtx-4090"), models={"llama-3.1-8b": model}, methods=("lora",))
    many = needs("llama-3.1-8b", model, methods=("lora",))
    for text in (format_fits(table, width), format_needs(many, width)):
        assert max(display_width(line) for line in text.splitlines()) <= width


def test_a_table_states_what_it_assumes_in_one_line() -> None:
    text = format_fits(fits(machine("rtx-4090"), models=table_models(SOME[:1])))
    line = text.splitlines()[-1]
    setup = TrainSetup()
    for words in (
        "bfloat16",
        f"rank {setup.rank}",
        "adamw",
        "checkpointing",
        "attention",
        "loss",
        "torch",
        "GiB",
    ):
        assert words in line
