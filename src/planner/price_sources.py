"""Public price catalogues: how each lays out its files, and how one of its rows becomes a row of finefit's.

Rows without accelerators are passed over. A name that could mean several cards is left out, never guessed: the memory
that a catalogue prints may choose between cards of one name, and says nothing else.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.catalog import find_catalog_gpu
from planner.errors import DataError, UsageError

Fetch = Callable[[str], bytes]
"""A file below the source's address -> its bytes. Raises FinefitError."""
Row = dict[str, Any]

MAX_CATALOGUE_BYTES = 256 * 2**20
"""Unpacked; the largest seen has 3 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One public catalogue: its address, providers read by default, how to fetch and read one of them.

    `read` gives (version, date or None, rows).
    """

    name: str
    url: str
    providers: tuple[str, ...]
    read: Callable[[Fetch, str], tuple[str, str | None, Iterator[Row]]]


PROVIDER_NAMES = {"lambdalabs": "lambda", "do": "digitalocean", "vastai": "vast"}
"""Where catalogues call a provider by another name than profiles/prices does."""


def _read_gpuhunt(fetch: Fetch, provider: str) -> tuple[str, str | None, Iterator[Row]]:
    """PROVIDER/version holds the newest version, PROVIDER/VERSION/catalog.zip the file PROVIDER.csv."""
    version = fetch(f"{provider}/version").decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[\w.-]{1,40}", version):
        raise UsageError(f"{provider}/version: {version[:40]!r} is no version")
    text = _unzipped(fetch(f"{provider}/{version}/catalog.zip"), f"{provider}.csv")
    day = re.match(r"(20\d\d)(\d\d)(\d\d)", version)
    rows = (
        _gpuhunt_row(row, provider)
        for row in _csv(text, ("price", "gpu_name", "gpu_count"))
        if row["gpu_name"]
    )
    return version, "-".join(day.groups()) if day else None, rows


def _gpuhunt_row(row: Mapping[str, str], provider: str) -> Row:
    return {
        "provider": PROVIDER_NAMES.get(provider, provider),
        "region": row.get("location") or "any",
        "instance": row.get("instance_name") or "",
        "gpu": card_name(row["gpu_name"], row.get("gpu_memory")),
        "num_gpus": _whole(row["gpu_count"]),
        "price": _price(row["price"]),
        "spot": (row.get("spot") or "").strip().lower() == "true",
    }


def _unzipped(data: bytes, name: str) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.getinfo(name).file_size > MAX_CATALOGUE_BYTES:
                raise DataError(name, "unpacks to more than 256 MiB")
            return archive.read(name).decode("utf-8")
    except (zipfile.BadZipFile, KeyError, EOFError, UnicodeDecodeError) as error:
        raise DataError(name, f"not a whole catalogue: {error}") from error


def _read_skypilot(fetch: Fetch, provider: str) -> tuple[str, str | None, Iterator[Row]]:
    """PROVIDER/vms.csv, undated: each row an instance in a zone with an on-demand price, a spot price, or both."""
    name = f"{provider}/vms.csv"
    try:
        text = fetch(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(name, f"not text: {error}") from error
    rows = _csv(text, ("AcceleratorName", "AcceleratorCount", "Price", "Region"))
    found = (made for row in rows if row["AcceleratorName"] for made in _skypilot_rows(row, provider))
    return "vms.csv", None, found


def _skypilot_rows(row: Mapping[str, str], provider: str) -> Iterator[Row]:
    """Rows of accelerators without an instance are the cards alone: the host has a row, and a price, of its own."""
    count = _whole(row["AcceleratorCount"])
    shared = {
        "provider": PROVIDER_NAMES.get(provider, provider),
        "region": row.get("AvailabilityZone") or row["Region"] or "any",
        "instance": row.get("InstanceType") or "",
        "gpu": card_name(single_card(row["AcceleratorName"], count), None),
        "num_gpus": count,
        "basis": "instance" if row.get("InstanceType") else "gpu-only",
    }
    for column, is_spot in (("Price", False), ("SpotPrice", True)):
        if (row.get(column) or "").strip():
            yield {**shared, "price": _price(row[column]), "spot": is_spot}


def single_card(name: str, count: object) -> str:
    """The card of a name that ends in the memory of all cards together.

    >>> single_card("A100-80GB-160GB", 2), single_card("A100-80GB", 2)
    ('A100-80GB', 'A100-80GB')
    """
    match = re.fullmatch(r"(.*-(\d+)GB)-(\d+)GB", name)
    if match and isinstance(count, int) and int(match[2]) * count == int(match[3]):
        return match[1]
    return name


def card_name(name: str, memory_gb: str | None) -> str:
    """The catalogue's name as finefit's; as it stands where it means no single card, for the reader to name.

    >>> card_name("A100", "40.0"), card_name("RTX4090", None), card_name("A100", None)
    ('A100 40GB SXM4', 'RTX 4090', 'A100')
    """
    memory = memory_gb.strip().removesuffix(".0") if memory_gb else ""
    for text in ([f"{name}-{memory}GB"] if memory else []) + [name]:
        try:
            return find_catalog_gpu(text).name
        except UsageError:
            continue
    return name


def _csv(text: str, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows. Raises DataError where a column is missing or the file ends in the middle of a row."""
    if not text.endswith("\n"):
        raise DataError("catalogue", "cut off: its last line has no end")
    reader = csv.DictReader(io.StringIO(text), strict=True)
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError("catalogue", f"no column {', '.join(missing)}: its layout has changed")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError("catalogue", "a row has too many or too few columns", reader.line_num)
            yield row
    except csv.Error as error:
        raise DataError("catalogue", f"not valid CSV: {error}", reader.line_num) from error


def _whole(text: str) -> object:
    """A whole number, or the text for the reader to name."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number == int(number) else text


def _price(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


SOURCES = (
    Source(
        name="gpuhunt",
        url="https://dstack-gpu-pricing.s3.eu-west-1.amazonaws.com/v3",
        providers=("aws", "azure", "gcp", "oci", "lambdalabs", "nebius", "runpod", "verda"),
        read=_read_gpuhunt,
    ),
    Source(
        name="skypilot",
        url="https://raw.githubusercontent.com/skypilot-org/skypilot-catalog/master/catalogs/v8",
        providers=("vast", "hyperstack"),
        read=_read_skypilot,
    ),
)
"""Read in this order."""
