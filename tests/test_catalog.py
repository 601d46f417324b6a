"""Names as people write them, counts, what torch can have of a card, purchase prices, and the index."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import card_prices, catalog, index
from planner.errors import FinefitError, NotModelledError, ProfileError, UnknownNameError, UsageError
from planner.gpu_names import CardWords, GpuNames
from planner.specs import GpuProfile

SPELLINGS = {
    "4090": "RTX 4090",
    "rtx 4090": "RTX 4090",
    "rtx-4090": "RTX 4090",
    "RTX4090": "RTX 4090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "geforce_rtx_4090": "RTX 4090",
    "4090 24GB": "RTX 4090",
    "RTX 4090 48G": "RTX 4090 48GB",
    "4090d": "RTX 4090 D",
    "RTX 4090D": "RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU": "RTX 4090 Laptop",
    "rtx 4090 mobile": "RTX 4090 Laptop",
    "4070Ti": "RTX 4070 Ti",
    "RTX 4070Ti SUPER 16GB": "RTX 4070 Ti SUPER",
    "4060 ti 16gb": "RTX 4060 Ti 16GB",
    "RTX 3060": "RTX 3060 12GB",
    "3080": "RTX 3080 10GB",
    "rtx3080 12 GB": "RTX 3080 12GB",
    "2060": "RTX 2060",
    "2080ti": "RTX 2080 Ti",
    "5090": "RTX 5090",
    "RTX 5090D": "RTX 5090 D",
    "A6000": "RTX A6000",
    "A6000-48GB": "RTX A6000",
    "NVIDIA RTX A6000": "RTX A6000",
    "RTX 6000 Ada": "RTX 6000 Ada",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "quadro rtx 6000": "Quadro RTX 6000",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000 Blackwell Server",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000 Blackwell Workstation",
    "NVIDIA A100-SXM4-80GB": "A100 80GB SXM4",
    "A100 80GB SXM4": "A100 80GB SXM4",
    "A100-80GB": "A100 80GB SXM4",
    "A100-80G-SXM": "A100 80GB SXM4",
    "NVIDIA A100 80GB PCIe": "A100 80GB PCIe",
    "a100 pcie 80gb": "A100 80GB PCIe",
    "NVIDIA A100-PCIE-40GB": "A100 40GB PCIe",
    "A100-40G-SXM": "A100 40GB SXM4",
    "NVIDIA H100 80GB HBM3": "H100 80GB SXM5",
    "H100 SXM": "H100 80GB SXM5",
    "NVIDIA H100 PCIe": "H100 80GB PCIe",
    "h100 nvl": "H100 NVL 94GB",
    "H200": "H200 SXM 141GB",
    "NVIDIA H20": "H20 96GB",
    "NVIDIA GH200 480GB": "GH200 96GB",
    "b200": "B200",
    "B200-SXM": "B200",
    "gb200": "GB200",
    "NVIDIA GB10": "GB10",
    "dgx spark": "GB10",
    "Tesla T4": "T4",
    "Tesla V100-SXM2-32GB": "V100 32GB SXM2",
    "v100 pcie 16gb": "V100 16GB PCIe",
    "Tesla P40": "P40",
    "A10G": "A10G",
    "A10": "A10",
    "L4": "L4",
    "NVIDIA L40S": "L40S",
    "L40": "L40",
    "AMD Instinct MI300X": "MI300X",
    "mi250x": "MI250X",
    "Radeon RX 7900 XTX": "RX 7900 XTX",
    "7900 xtx": "RX 7900 XTX",
    "gaudi2": "Gaudi 2",
    "Gaudi-3": "Gaudi 3",
    "tpu-v5e": "TPU v5e",
    "trillium": "TPU v6e",
    "m2 ultra": "Apple M2 Ultra",
    "Ascend 910B": "Ascend 910B3",
}

CATALOG_SPELLINGS = {
    "H100": "H100 80GB SXM5",
    "H100 (cluster)": "H100 80GB SXM5",
    "H100 PCIe": "H100 80GB PCIe",
    "H100 NVL": "H100 NVL 94GB",
    "H200 (cluster)": "H200 SXM 141GB",
    "GH200": "GH200 96GB",
    "V100-16GB": "V100 16GB SXM2",
    "V100-32G": "V100 32GB SXM2",
    "P100-16G": "P100 16GB PCIe",
    "A800-80GB": "A800 80GB SXM4",
    "RTX PRO 6000": "RTX PRO 6000 Blackwell Server",
    "L40S": "L40S",
}

AMBIGUOUS = {
    "a100": {"A100 40GB PCIe", "A100 80GB PCIe", "A100 40GB SXM4", "A100 80GB SXM4"},
    "NVIDIA H100": {"H100 80GB SXM5", "H100 80GB PCIe", "H100 NVL 94GB"},
    "v100 32gb pcie sxm": set(),
    "4060ti": {"RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB"},
    "rtx 6000": {"RTX 6000 Ada", "Quadro RTX 6000", "RTX PRO 6000 Blackwell Server"},
    "laptop": {"RTX 3060 Laptop", "RTX 3070 Laptop"},
}

REAL_WORDS = [
    "rtx",
    "a100",
    "h100",
    "4090",
    "ti",
    "super",
    "80gb",
    "sxm",
    "pcie",
    "laptop",
    "6000",
    ":",
    "2",
    "d",
]

UNKNOWN = [
    "",
    " ",
    "rtx",
    "nvidia",
    "80gb",
    "a80",
    "h141",
    "4091",
    "2x 4090",
    "GTX TITAN X (Maxwell)",
    "A100 24GB",
]


@pytest.mark.parametrize(("text", "name"), SPELLINGS.items(), ids=list(SPELLINGS))
def test_people_find_their_card(text: str, name: str) -> None:
    assert catalog.find_gpu(text).name == name


@pytest.mark.parametrize(("text", "name"), CATALOG_SPELLINGS.items(), ids=list(CATALOG_SPELLINGS))
def test_price_lists_name_the_card_they_sell(text: str, name: str) -> None:
    assert catalog.find_catalog_gpu(text).name == name


@pytest.mark.parametrize("name", catalog.gpus())
def test_a_card_is_found_by_its_name_and_every_alias(name: str) -> None:
    for spelling in (name, name.upper(), name.replace(" ", "-"), *catalog.gpus()[name].aliases):
        assert catalog.find_gpu(spelling).name == name


@pytest.mark.parametrize(("text", "names"), AMBIGUOUS.items(), ids=list(AMBIGUOUS))
def test_several_cards_are_listed_and_none_is_taken(text: str, names: set[str]) -> None:
    with pytest.raises(UsageError) as caught:
        catalog.find_gpu(text)
    assert all(name in str(caught.value) for name in names)
    assert isinstance(caught.value, UnknownNameError) is not bool(names)


@pytest.mark.parametrize("text", UNKNOWN, ids=repr)
def test_an_unknown_card_is_an_error(text: str) -> None:
    with pytest.raises(UnknownNameError):
        catalog.find_gpu(text)


def test_an_unknown_card_comes_with_its_nearest() -> None:
    with pytest.raises(UnknownNameError, match="RTX 4090") as caught:
        catalog.find_gpu("NVIDIA GeForce RTX 4091")
    assert caught.value.exit_code == 2


def test_a_longer_name_wins_over_its_part() -> None:
    cards = [
        CardWords(gpu=name, spellings=(name,), memory_gib=8, memory_type="GDDR6")
        for name in ("XT 9 SUPER", "XT 9", "XT 9 SUPER DUPER")
    ]
    assert GpuNames(cards).resolve("super 9 xt") == "XT 9 SUPER"


@given(st.text(max_size=30))
def test_any_text_resolves_or_is_a_usage_error(text: str) -> None:
    try:
        gpu, count = catalog.parse_gpu(text)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert gpu.name in catalog.gpus()
        assert count >= 1


@given(st.lists(st.sampled_from(REAL_WORDS), max_size=5))
def test_any_heap_of_real_words_resolves_or_is_a_usage_error(heap: list[str]) -> None:
    try:
        catalog.parse_gpu(" ".join(heap))
    except UsageError as error:
        assert error.exit_code == 2


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [("rtx-4090:2", "RTX 4090", 2), ("4090", "RTX 4090", 1), ("A100-80GB : 16", "A100 80GB SXM4", 16)],
)
def test_a_count_follows_a_colon(text: str, name: str, count: int) -> None:
    gpu, found = catalog.parse_gpu(text)
    assert (gpu.name, found) == (name, count)


@pytest.mark.parametrize("tail", ["", "0", "-1", "two", "1.5", "٣", "²", "9" * 5000, "1e3", "+2"])
def test_a_bad_count_is_a_usage_error(tail: str) -> None:
    with pytest.raises(UsageError, match="whole number from 1"):
        catalog.parse_gpu(f"4090:{tail}")


def gib(gpu: str) -> float:
    return catalog.usable_bytes_or_bound(catalog.find_gpu(gpu))[0] / 2**30


def test_published_totals_are_taken_as_they_are() -> None:
    assert gib("RTX 4090") == pytest.approx(23.6, abs=0.05)
    assert gib("A100 80GB SXM4") == pytest.approx(79.25, abs=0.06)


@pytest.mark.parametrize("name", [n for n, g in catalog.gpus().items() if g.modelled])
def test_every_modelled_card_has_a_usable_size_below_its_total(name: str) -> None:
    gpu = catalog.gpus()[name]
    usable_bytes, reason = catalog.usable_bytes_or_bound(gpu)
    assert 0.85 * gpu.memory_bytes < usable_bytes < gpu.memory_bytes
    assert reason.startswith("derived:") is (gpu.usable_bytes is None)


TOTALS_KNOWN_TWICE = [
    name
    for name, gpu in catalog.gpus().items()
    if gpu.usable_bytes and not gpu.unified_memory and "nvidia_smi_mib" in catalog.raw_gpu(name)
]


@pytest.mark.parametrize("name", TOTALS_KNOWN_TWICE)
def test_the_bound_from_other_cards_is_near_the_truth(name: str) -> None:
    gpu = catalog.gpus()[name]
    assert gpu.usable_bytes is not None
    bound, reason = catalog.usable_bytes_or_bound(replace(gpu, usable_bytes=None))
    assert 0.95 * gpu.usable_bytes < bound < 1.026 * gpu.usable_bytes
    assert name not in re.findall(r"\((.*)\)", reason)


def test_without_any_figure_of_the_vendor_nothing_is_invented() -> None:
    with pytest.raises(NotModelledError, match="TPU v4"):
        catalog.usable_bytes_or_bound(catalog.find_gpu("TPU v4"))


def test_one_die_of_a_double_card_is_one_device() -> None:
    assert catalog.find_gpu("MI250X").memory_bytes == 64 * 2**30


def test_link_and_bus_count_one_direction() -> None:
    a100 = catalog.find_gpu("A100 80GB SXM4")
    assert a100.link_bytes_per_s == 300e9
    assert a100.pcie_bytes_per_s == pytest.approx(31.5e9, rel=0.01)
    assert catalog.find_gpu("RTX 4090").link_bytes_per_s is None


def bare(name: str, **facts: float) -> GpuProfile:
    return replace(catalog.find_gpu("TPU v4"), name=name, sources=dict.fromkeys(facts, "recall"), **facts)


def test_prices_come_with_date_quality_and_source() -> None:
    prices = card_prices.card_prices(catalog.find_gpu("RTX 4090"))
    assert {p.currency for p in prices} == {"USD", "CNY"}
    assert all(p.source and p.quality in card_prices.QUALITIES for p in prices)


def test_the_newest_good_price_is_the_one_to_go_by() -> None:
    price = card_prices.card_price(catalog.find_gpu("RTX 4090"))
    assert price is not None
    assert (price.kind, price.as_of, price.low, price.high) == ("used", "2026-02", 1200, 1500)


def test_conflicting_prices_are_shown_and_never_used() -> None:
    gpu = catalog.find_gpu("RTX 5090")
    assert any(p.quality == "conflict" for p in card_prices.card_prices(gpu, "USD"))
    price = card_prices.card_price(gpu)
    assert price is not None
    assert price.quality == "ok"


def test_a_launch_price_counts_and_an_unknown_price_sorts_last() -> None:
    cheap = bare("cheap", launch_price_usd=100)
    dear = bare("dear", launch_price_usd=900)
    unknown = bare("a card nobody prices")
    assert card_prices.card_price(unknown) is None
    assert card_prices.card_price(cheap, "CNY") is None
    assert sorted([unknown, dear, cheap], key=card_prices.cheapest_first) == [cheap, dear, unknown]


def test_the_index_is_what_the_toml_files_say() -> None:
    assert index.stale_indexes(catalog.profiles_dir()) == [], "run `make index`"


@pytest.mark.parametrize("folder", index.indexed_folders(catalog.profiles_dir()))
def test_profiles_come_by_file(folder: str) -> None:
    files = {path.stem for path in (catalog.profiles_dir() / folder).glob("*.toml")}
    assert set(catalog.raw_profiles(folder)) == files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "plants").mkdir()
    (tmp_path / "plants" / "oak.toml").write_text('height_m = 20\nnote = "tall — very"\n', "utf-8")
    return tmp_path


def test_an_index_follows_its_files(tree: Path) -> None:
    oak, written = tree / "plants" / "oak.toml", tree / "index" / "plants.json"
    assert index.write_indexes(tree) == [written]
    assert json.loads(written.read_text("utf-8")) == {"oak": {"height_m": 20, "note": "tall — very"}}
    assert index.write_indexes(tree) == []
    oak.write_text("height_m = 21\n", "utf-8")
    assert index.stale_indexes(tree) == [written]
    oak.unlink()
    index.write_indexes(tree)
    assert not written.exists()


@pytest.mark.parametrize("text", ["height_m = ", "planted = 2020-01-01\n"])
def test_a_broken_profile_is_named(tree: Path, text: str) -> None:
    (tree / "plants" / "oak.toml").write_text(text, "utf-8")
    with pytest.raises(ProfileError, match=re.escape("oak.toml")):
        index.write_indexes(tree)
    assert not (tree / "index").exists()


def test_a_missing_index_is_a_profile_error() -> None:
    with pytest.raises(ProfileError, match="reinstall"):
        catalog.raw_profiles("no-such-folder")


def test_the_index_command_checks_and_refuses_nonsense() -> None:
    command = [sys.executable, "-m", "planner.index"]
    assert subprocess.run([*command, "--check"], capture_output=True, check=False).returncode == 0
    refused = subprocess.run([*command, "--chekc"], capture_output=True, text=True, check=False)
    assert refused.returncode == UsageError.exit_code
    assert refused.stderr.startswith("error: usage:")


def test_looking_up_a_card_imports_no_toml_parser() -> None:
    code = "import sys; from planner import catalog; catalog.find_gpu('a6000 48g'); print('tomllib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_all_errors_of_the_catalogue_belong_to_the_tree() -> None:
    for text in ("4090:0", "nothing like it", "a100"):
        with pytest.raises(FinefitError):
            catalog.parse_gpu(text)
