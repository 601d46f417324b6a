"""Refreshing prices from public catalogues, the user's own price file, and what is in use: local files only."""

from __future__ import annotations

import datetime
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.cli import run
from planner.errors import FinefitError, UsageError
from planner.files import user_data_folder
from planner.offers import Offer, parse_offers
from planner.price_refresh import fetcher, refresh
from planner.price_snapshot import snapshot_folder, snapshot_rows
from planner.price_sources import SOURCES, card_name, single_card
from planner.prices import known_prices
from planner.user_prices import default_price_file, parse_user_prices

TODAY = datetime.date(2026, 11, 22)
GPUHUNT, SKYPILOT = SOURCES
Run = Callable[..., tuple[int, str, str]]

GPUHUNT_HEAD = (
    "instance_name,location,price,cpu,memory,gpu_count,gpu_name,gpu_memory,spot,disk_size,gpu_vendor,flags,"
    "cpu_arch,provider_data\n"
)
GPUHUNT_ROWS = (
    "g5.xlarge,us-east-1,1.006,4,16,1,A10G,24.0,False,,nvidia,[],x86,{}\n"
    "g5.xlarge,us-east-1,0.0,4,16,1,A10G,24.0,True,,nvidia,[],x86,{}\n"
    "p4d.24xlarge,us-east-1,21.96,96,1152,8,A100,40.0,False,,nvidia,[],x86,{}\n"
    "p4d.24xlarge,us-west-2,23.00,96,1152,8,A100,40.0,False,,nvidia,[],x86,{}\n"
    "m5.large,us-east-1,0.096,2,8,0,,,False,,,[],x86,{}\n"
    "odd.large,us-east-1,5.0,2,8,1,Trainium,32.0,False,,aws,[],x86,{}\n"
)
SKYPILOT_HEAD = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice,AvailabilityZone\n"


def gpuhunt_mirror(
    folder: Path, rows: str = GPUHUNT_ROWS, provider: str = "aws", version: str = "20261120-7"
) -> Path:
    (folder / provider / version).mkdir(parents=True, exist_ok=True)
    (folder / provider / "version").write_text(version + "\n")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{provider}.csv", GPUHUNT_HEAD + rows)
    (folder / provider / version / "catalog.zip").write_bytes(packed.getvalue())
    return folder


def skypilot_mirror(folder: Path, rows: str, provider: str = "vast") -> Path:
    (folder / provider).mkdir(parents=True, exist_ok=True)
    (folder / provider / "vms.csv").write_text(SKYPILOT_HEAD + rows)
    return folder


def stored() -> list[Offer]:
    offers, faults = parse_offers(snapshot_rows(snapshot_folder()))
    assert not faults
    return list(offers)


# ------------------------------------------------------------- catalogues


@pytest.mark.parametrize("address", ["folder", "file"])
def test_gpuhunts_layout_is_read_from_a_folder_and_a_file_address(tmp_path: Path, address: str) -> None:
    folder = gpuhunt_mirror(tmp_path / "mirror")
    done = refresh(GPUHUNT, str(folder) if address == "folder" else folder.as_uri(), TODAY, providers=["aws"])
    assert done.num_offers == {"aws": 2}
    by_card = {offer.gpu: offer for offer in stored()}
    assert by_card["A10G"].low == 1.006
    # the cheapest region of the same day; the date is the version's
    cheapest = by_card["A100 40GB SXM4"]
    assert (cheapest.low, cheapest.num_gpus, cheapest.region) == (21.96, 8, "us-east-1")
    assert cheapest.as_of == "2026-11-20"
    assert "gpuhunt aws 20261120-7" in cheapest.source
    assert any("missing" in reason for reason in done.left_out)
    assert any("Trainium" in reason for reason in done.left_out)


def test_skypilots_catalogue_with_its_known_errors(tmp_path: Path) -> None:
    folder = skypilot_mirror(
        tmp_path,
        "1x-RTX_4090,RTX4090,1.0,32,64,0.40,SE,,0.00,\n"
        "2x-A100,A100-80GB-160GB,2.0,32,64,1.87,US,,1.00,\n"
        "1x-A100,A100,1.0,32,64,0.50,US,,0.00,\n"
        ",H100,1,,,9.79,us-east4,,5.3,\n"
        ",L4,1,,,0.50,us-central1,,0.70,\n"
        "cpu,,,2,8,0.10,US,,,\n",
    )
    done = refresh(SKYPILOT, str(folder), TODAY, providers=["vast"])
    offers = stored()
    found = {(offer.gpu, offer.num_gpus, offer.is_spot): offer for offer in offers}
    assert set(found) == {
        ("RTX 4090", 1, False),
        ("A100 80GB SXM4", 2, False),
        ("A100 80GB SXM4", 2, True),
        ("H100 80GB SXM5", 1, False),
        ("H100 80GB SXM5", 1, True),
        ("L4", 1, True),
    }
    assert found["H100 80GB SXM5", 1, False].basis == "gpu-only"
    assert all(offer.as_of is None for offer in offers)
    reasons = " ".join(done.left_out)
    for words in ("missing", "below spot", "'A100' can be several"):
        assert words in reasons


def test_a_name_with_the_memory_of_all_cards_is_that_of_one() -> None:
    assert single_card("A100-80GB-160GB", 2) == "A100-80GB"
    assert single_card("A100-80GB-160GB", 4) == "A100-80GB-160GB"
    assert card_name("A100", "80.0") == "A100 80GB SXM4"


def test_a_provider_that_cant_be_read_keeps_its_old_rows(tmp_path: Path) -> None:
    old = gpuhunt_mirror(tmp_path / "old")
    gpuhunt_mirror(old, provider="azure")
    refresh(GPUHUNT, str(old), TODAY, providers=["aws", "azure"])
    new = gpuhunt_mirror(tmp_path / "new", version="20261121-1")
    done = refresh(GPUHUNT, str(new), TODAY, providers=["aws", "azure"])
    assert list(done.problems) == ["azure"]
    assert {(offer.provider, offer.as_of) for offer in stored()} == {
        ("aws", "2026-11-21"),
        ("azure", "2026-11-20"),
    }


def cut_zip(folder: Path) -> None:
    path = folder / "aws" / "20261120-7" / "catalog.zip"
    path.write_bytes(path.read_bytes()[:-30])


def cut_rows(folder: Path) -> None:
    gpuhunt_mirror(folder, GPUHUNT_ROWS[:-25])


def changed_columns(folder: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("aws.csv", "name,cost\na,1\n")
    (folder / "aws" / "20261120-7" / "catalog.zip").write_bytes(packed.getvalue())


def odd_version(folder: Path) -> None:
    (folder / "aws" / "version").write_text("../../secret")


def no_file(folder: Path) -> None:
    (folder / "aws" / "20261120-7" / "catalog.zip").unlink()


def unusable_rows(folder: Path) -> None:
    gpuhunt_mirror(folder, "odd,us,1.0,2,8,1,Abacus,32.0,False,,x,[],x86,{}\n")


@pytest.mark.parametrize("harm", [cut_zip, cut_rows, changed_columns, odd_version, no_file, unusable_rows])
def test_a_refresh_that_fails_leaves_the_old_snapshot_and_says_so(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = gpuhunt_mirror(tmp_path)
    path = refresh(GPUHUNT, str(folder), TODAY, providers=["aws"]).path
    before = path.read_bytes()
    harm(folder)
    with pytest.raises(FinefitError, match="stays as it is") as caught:
        refresh(GPUHUNT, str(folder), TODAY, providers=["aws"])
    assert "2026-11-20" in str(caught.value)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_without_an_old_snapshot_the_shipped_prices_stay_in_use(tmp_path: Path) -> None:
    with pytest.raises(FinefitError, match="came with finefit"):
        refresh(GPUHUNT, str(tmp_path), TODAY, providers=["aws"])
    assert not snapshot_folder().exists()


def test_a_network_that_is_not_there_is_a_failed_refresh() -> None:
    with pytest.raises(FinefitError, match="nothing could be read"):
        refresh(GPUHUNT, "https://mirror.example/v3", TODAY, providers=["aws"])


@pytest.mark.parametrize("address", ["ftp://mirror.example", "no-such-folder", "data:text/plain,1"])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="--from"):
        fetcher(address)


def test_refreshed_prices_are_used_and_the_newest_wins(tmp_path: Path) -> None:
    shipped = known_prices((), TODAY)
    refresh(GPUHUNT, str(gpuhunt_mirror(tmp_path)), TODAY, providers=["aws"])
    known = known_prices((), TODAY)
    assert [origin.num_offers for origin in known.origins] == [len(shipped.book.offers), 2]
    assert known.origins[1].newest_age_days == 2


def test_a_broken_line_in_a_snapshot_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    path = refresh(GPUHUNT, str(gpuhunt_mirror(tmp_path)), TODAY, providers=["aws"]).path
    path.write_text(path.read_text() + '{"provider": "aws", "gpu": "A1\n')
    known = known_prices((), TODAY)
    assert known.origins[1].num_offers == 2
    assert any(f"{path}:3" in fault for fault in known.book.faults)


# ------------------------------------------------------------- the user's file

MINE = """\
# my prices
offers:
  - {provider: autodl, gpu: rtx-4090, price: 1.98, currency: CNY, as_of: 2026-11-20, source: my account}
  - provider: gongji
    gpu: RTX 5090
    price: [3.0, 3.5]
    currency: TWD
    as_of: 2026
    source: their page
rates:
  USD/TWD: 32
"""


def write_mine(text: str, path: Path | None = None) -> Path:
    path = path or default_price_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_own_offers_are_used_in_their_own_currency() -> None:
    write_mine(MINE)
    known = known_prices((), TODAY)
    mine = known.book.offers[-2:]
    assert [(o.low, o.high, o.currency, o.as_of) for o in mine] == [
        (1.98, 1.98, "CNY", "2026-11-20"),
        (3.0, 3.5, "TWD", "2026"),
    ]
    assert known.rates.per_eur["TWD"] == pytest.approx(32 * known.rates.per_eur["USD"])


def test_the_manual_s_price_file_is_valid() -> None:
    manual = Path(__file__).parents[1] / "docs" / "prices.md"
    if not manual.is_file():
        pytest.skip("needs the source tree")
    block = manual.read_text("utf-8").partition("```yaml\n")[2].partition("```")[0]
    found = parse_user_prices(block, "prices.md")
    offers, faults = parse_offers(found.rows)
    assert (len(offers), faults) == (1, ())
    assert found.rates


def test_a_broken_row_of_ones_own_is_named_with_file_and_line_and_the_rest_is_used(tmp_path: Path) -> None:
    path = write_mine(MINE.replace("price: [3.0, 3.5]", "price: -3"), tmp_path / "mine.yaml")
    known = known_prices([str(path)], TODAY)
    assert known.origins[-1].num_offers == 1
    assert any(fault.startswith(f"{path}:4: price") for fault in known.book.faults)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("offers: 5\n", 1, "not a list"),
        ("offers:\n  - 5\n", 1, "offer 1"),
        ("offer: []\n", 1, "no such key"),
        ("rates: []\n", 1, "not a mapping"),
        ("rates:\n  USD/TWD: many\n", 2, "not a number"),
        ("offers:\n  - provider: a\n    provider: b\n", 3, "given twice"),
        ("offers: [\n", 2, "not valid YAML"),
        ("offers: &a []\n", 1, "anchors"),
        ("offers: !!python/object/apply:os.system [ls]\n", 1, "tags"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_user_prices(text, "mine.yaml")
    assert str(caught.value).startswith(f"mine.yaml:{line}: ")
    assert says in str(caught.value)


values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers(), max_size=2)
)
keys = st.sampled_from(
    ["provider", "gpu", "price", "source", "currency", "as_of", "spot", "num_gpus", "region", "x"]
)


@settings(deadline=None)
@given(st.dictionaries(keys, values))
def test_no_row_can_break_more_than_itself(row: dict[str, Any]) -> None:
    good = {"provider": "a", "gpu": "RTX 4090", "price": 1.0, "source": "b"}
    offers, faults = parse_offers([("1", good), ("2", {**good, **row}), ("3", good)])
    assert len(offers) + len(faults) == 3
    assert len(offers) >= 2


# ------------------------------------------------------------- the command


@pytest.fixture
def finefit(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_refresh_then_show(finefit: Run, tmp_path: Path) -> None:
    mirror = str(gpuhunt_mirror(tmp_path / "mirror"))
    code, out, err = finefit(
        "prices", "refresh", "--source", "gpuhunt", "--from", mirror, "--provider", "aws"
    )
    assert code == 0
    assert "aws 2 offers" in out
    assert "left out" in err
    code, out, _ = finefit("prices", "show")
    assert code == 0
    assert str(user_data_folder()) in out
    origins = json.loads(finefit("prices", "show", "--json")[1])["origins"]
    assert origins[1]["num_offers"] == 2


def test_json_of_a_refresh(finefit: Run, tmp_path: Path) -> None:
    mirror = str(gpuhunt_mirror(tmp_path / "mirror"))
    _, out, _ = finefit(
        "prices", "refresh", "--source", "gpuhunt", "--from", mirror, "--provider", "aws", "--json"
    )
    (done,) = json.loads(out)["refreshed"]
    assert done["num_offers"] == {"aws": 2}


def test_costs_uses_the_users_file_and_names_its_broken_rows(finefit: Run, tmp_path: Path) -> None:
    path = write_mine(MINE.replace("price: [3.0, 3.5]", "price: dear"), tmp_path / "mine.yaml")
    words = (
        "costs",
        "smollm2-135m",
        "--gpu",
        "rtx-4090",
        "--max-steps",
        "5",
        "--prices",
        str(path),
        "--json",
    )
    code, out, err = finefit(*words)
    assert code == 0
    assert err.startswith(f"left out: {path}:4: price")
    answer = json.loads(out)["cost"]
    assert any(row["source"] == "my account" for row in answer["offers"])
    assert any(f"{path}:4" in fault for fault in answer["left_out"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("prices", "refresh", "--from", "."), "--source"),
        (("prices", "refresh", "--source", "gpuhant"), "gpuhunt"),
        (("prices", "show", "--source", "gpuhunt"), "takes no"),
        (("prices", "refresh", "--source", "gpuhunt", "--from", "nowhere"), "no such folder"),
        (("prices", "refresh", "--source", "gpuhunt", "--from", "."), "nothing could be read"),
        (("costs", "smollm2-135m", "--gpu", "rtx-4090", "--prices", "no.yaml"), "no.yaml"),
    ],
)
def test_mistakes_are_one_line(finefit: Run, words: tuple[str, ...], says: str) -> None:
    code, out, err = finefit(*words)
    assert code in (1, 2)
    assert out == ""
    assert err.count("\n") == 1
    assert says in err


def test_when_both_sources_fail_the_exit_code_says_so(finefit: Run) -> None:
    code, out, err = finefit("prices", "refresh", "--provider", "aws")
    assert (code, out) == (1, "")
    assert err.count("came with finefit") == 2
