"""Laws of the data in profiles/gpus and profiles/prices, read from the TOML that people edit."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from planner import card_prices, catalog
from planner.gpu_names import clashes

FOLDER = catalog.profiles_dir() / "gpus"
ARCHITECTURES = tomllib.loads((FOLDER / "architectures.toml").read_text("utf-8"))["architectures"]
FILES = sorted(path for path in FOLDER.glob("*.toml") if path.stem != "architectures")
CARDS = {
    name: (path.stem, card)
    for path in FILES
    for name, card in tomllib.loads(path.read_text("utf-8"))["gpus"].items()
}
PRICES = tomllib.loads((catalog.profiles_dir() / "prices" / "cards.toml").read_text("utf-8"))

TEXTS = {"compute_capability", "memory_type", "release_date", "note"}
COUNTS = {"num_sms", "pcie_lanes", "pcie_generation"}
UNITS = ("_gib", "_mib", "_gb_s", "_tflops", "_tops", "_mhz", "_w", "_usd", "_cny")
UNSOURCED = {"aliases", "catalog_names", "note", "sources", "torch_total_seen_gib", "unified_memory"}
CAPABILITIES = {"backend", "modelled", "bf16", "flash_attention", "bitsandbytes", "fp8"}
BACKENDS = {"cuda", "rocm", "mps", "tpu", "hpu", "npu"}
MEMORY_RULES = {"cuda", "rocm"}


def sourced(entry: dict[str, Any]) -> list[str]:
    return [key for source in entry["sources"] for key in source["of"]]


def numbers(card: dict[str, Any]) -> dict[str, float]:
    kept = {k: v for k, v in card.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return kept | {
        f"{k}[{i}]": x for k, v in card.items() if k.endswith("_seen_gib") for i, x in enumerate(v)
    }


@pytest.fixture(params=CARDS, ids=str)
def card(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = CARDS[request.param][1]
    return found


@pytest.fixture(params=CARDS, ids=str)
def card_of(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    stem, found = CARDS[request.param]
    return ARCHITECTURES[stem], found


def test_there_are_enough_accelerators_of_enough_vendors() -> None:
    assert len(CARDS) >= 120
    assert len(CARDS) == sum(len(tomllib.loads(p.read_text("utf-8"))["gpus"]) for p in FILES)
    assert {a["vendor"] for a in ARCHITECTURES.values()} >= {
        "NVIDIA",
        "AMD",
        "Intel",
        "Google",
        "Apple",
        "Huawei",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_is_named_after_its_architecture(path: Path) -> None:
    assert path.stem in ARCHITECTURES


@pytest.mark.parametrize("stem", ARCHITECTURES)
def test_an_architecture_is_whole_and_has_cards(stem: str) -> None:
    architecture = ARCHITECTURES[stem]
    assert {"title", "vendor", "compute_capabilities"} | CAPABILITIES <= set(architecture)
    assert set(sourced(architecture)) - {"compute_capabilities"} == CAPABILITIES
    assert len(sourced(architecture)) == len(set(sourced(architecture)))
    assert architecture["backend"] in BACKENDS
    assert any(stem == s for s, _ in CARDS.values())


@pytest.mark.parametrize("stem", ARCHITECTURES)
def test_only_back_ends_with_memory_rules_are_modelled(stem: str) -> None:
    architecture = ARCHITECTURES[stem]
    assert architecture["modelled"] is (architecture["backend"] in MEMORY_RULES)


@pytest.mark.parametrize("stem", [s for s, a in ARCHITECTURES.items() if a["vendor"] == "NVIDIA"])
def test_bf16_and_flash_attention_start_at_8_0_and_fp8_at_8_9(stem: str) -> None:
    for text in ARCHITECTURES[stem]["compute_capabilities"]:
        capability = tuple(int(part) for part in text.split("."))
        assert ARCHITECTURES[stem]["bf16"] is (capability >= (8, 0))
        assert ARCHITECTURES[stem]["flash_attention"] is (capability >= (8, 0))
        assert ARCHITECTURES[stem]["fp8"] is (capability >= (8, 9))


def test_numbers_are_positive_and_say_their_unit(card: dict[str, Any]) -> None:
    for key, value in numbers(card).items():
        assert value > 0, key
        assert key.split("[")[0] in COUNTS or key.split("[")[0].endswith(UNITS), key
    assert set(card) - set(numbers(card)) <= TEXTS | UNSOURCED


def test_every_fact_has_exactly_one_source(card: dict[str, Any]) -> None:
    assert sorted(sourced(card)) == sorted(set(card) - UNSOURCED)
    assert all(source["is"].strip() for source in card["sources"])


def test_compute_capability_belongs_to_the_architecture(
    card_of: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    architecture, card = card_of
    known = architecture["compute_capabilities"]
    assert card.get("compute_capability") in (known or [None])


def test_peaks_exist_only_where_the_hardware_has_them(card_of: tuple[dict[str, Any], dict[str, Any]]) -> None:
    architecture, card = card_of
    assert "bf16_tflops" not in card or architecture["bf16"]
    assert "fp8_tflops" not in card or architecture["fp8"]


def test_peaks_rise_as_precision_falls(card: dict[str, Any]) -> None:
    for order in (
        ["fp32_tflops", "tf32_tflops", "bf16_tflops", "fp8_tflops"],
        ["fp32_tflops", "fp16_tflops", "int8_tops"],
    ):
        peaks = [card[key] for key in order if key in card]
        for lower, higher in itertools.pairwise(peaks):
            assert lower <= higher * 1.005, order


def test_a_computed_peak_is_what_its_source_says(card: dict[str, Any]) -> None:
    for source in card["sources"]:
        rate = re.match(r"computed: num_sms x boost_mhz x (\d+) FLOP", source["is"])
        if rate and "fp16_tflops" in card:
            computed_tflops = card["num_sms"] * card["boost_mhz"] * int(rate.group(1)) / 1e6
            assert card["fp16_tflops"] == pytest.approx(computed_tflops, abs=0.06)


def test_totals_shrink_from_the_box_to_torch(card: dict[str, Any]) -> None:
    assert card.get("nvidia_smi_mib", 0) / 1024 <= card["memory_gib"]
    if "torch_total_gib" in card:
        low, high = card.get("torch_total_seen_gib", [card["torch_total_gib"]] * 2)
        assert low <= card["torch_total_gib"] <= high
        assert high <= card.get("nvidia_smi_mib", card["memory_gib"] * 1024) / 1024
        assert low > 0.85 * card["memory_gib"]


def test_dates_and_buses_have_one_form(card: dict[str, Any]) -> None:
    assert re.fullmatch(r"20\d\d(-\d\d(-\d\d)?)?", card.get("release_date", "2020"))
    assert ("pcie_generation" in card) is ("pcie_lanes" in card)
    assert card.get("pcie_generation", 3) in catalog.PCIE_LANE_BYTES_PER_S


def test_no_two_cards_share_a_spelling() -> None:
    assert clashes(catalog.card_words()) == {}
    listed = [name for _, card in CARDS.values() for name in card.get("catalog_names", ())]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", CARDS)
def test_the_profile_says_what_the_file_says(name: str) -> None:
    stem, card = CARDS[name]
    gpu = catalog.gpus()[name]
    assert gpu.architecture == ARCHITECTURES[stem]["title"]
    assert gpu.memory_bytes == round(card["memory_gib"] * 2**30)
    assert gpu.bandwidth_bytes_per_s == pytest.approx(card["bandwidth_gb_s"] * 1e9)
    assert gpu.flops.get("bfloat16", 0) == pytest.approx(card.get("bf16_tflops", 0) * 1e12)
    assert (gpu.usable_bytes is None) is ("torch_total_gib" not in card)


@pytest.mark.parametrize("name", CARDS)
def test_every_known_field_of_a_profile_has_a_source(name: str) -> None:
    gpu = catalog.gpus()[name]
    fields = {"memory_bytes", "usable_bytes", "bandwidth_bytes_per_s", "tdp_w", "link_bytes_per_s"}
    fields |= {"pcie_bytes_per_s", "launch_price_usd", "launch_price_cny", "release_date"} | CAPABILITIES
    known = {field for field in fields if getattr(gpu, field) is not None}
    assert known | {f"flops.{dtype}" for dtype in gpu.flops} <= set(gpu.sources)


@pytest.mark.parametrize("row", [*PRICES["cards"], *PRICES["boxes"]], ids=lambda row: row["gpu"])
def test_a_price_row_is_whole(row: dict[str, Any]) -> None:
    assert row["gpu"] in CARDS
    assert row["quality"] in card_prices.QUALITIES
    assert row.get("kind", "list") in card_prices.KINDS
    assert row["source"].strip()
    assert re.fullmatch(r"20\d\d(-(\d\d|Q[1-4]))?", row.get("as_of", "2020"))
    assert "as_of" in row or row["quality"] == "recall"
    ranges = [row[currency] for currency in card_prices.CURRENCIES if currency in row]
    assert ranges
    assert all(0 < low <= high for low, high in ranges)
