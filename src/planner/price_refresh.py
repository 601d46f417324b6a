"""`finefit prices refresh`: public catalogues -> a snapshot in the user's data folder, one file for each source.

A file is replaced as a whole and only by a better one: a provider that can't be read keeps its old rows, and when
none can be read the old file stays as it is.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import FinefitError, UsageError
from planner.files import write_atomically
from planner.offers import Offer, parse_offers
from planner.price_book import best_offers
from planner.price_checks import check_offers
from planner.price_snapshot import parsed_rows, snapshot_folder
from planner.price_sources import MAX_CATALOGUE_BYTES, PROVIDER_NAMES, Fetch, Source

TIMEOUT_S = 30.0
_SCHEMES = ("http", "https", "file")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refreshed:
    """What became of one source: offers by provider, problems by provider, and how many rows were left out."""

    source: str
    path: Path
    num_offers: Mapping[str, int]
    problems: Mapping[str, str]
    num_left_out: int
    left_out: tuple[str, ...]
    kept: str | None


def refresh(
    source: Source,
    address: str,
    today: datetime.date,
    *,
    providers: Sequence[str] = (),
    folder: Path | None = None,
) -> Refreshed:
    """Read a source's providers from `address` (http, https, file:// or a folder) and replace its snapshot.

    Raises UsageError for an address of another kind, FinefitError when no provider could be read: the old snapshot
    then stays as it is, and the message says so.
    """
    path = (folder or snapshot_folder()) / f"{source.name}.jsonl"
    fetch = fetcher(address)
    fresh: dict[str, list[dict[str, Any]]] = {}
    problems: dict[str, str] = {}
    left_out: list[str] = []
    for provider in providers or source.providers:
        try:
            offers, faults = _read(source, fetch, provider, address, today)
        except FinefitError as error:
            problems[provider] = str(error)
            continue
        fresh[provider] = [_row(offer) for offer in offers]
        left_out += faults
    if not fresh:
        reason = next(iter(problems.values()), "no provider")
        raise FinefitError(
            f"{source.name}: nothing could be read from {address} ({reason}); {_old_state(path)}"
        )
    kept = _old_rows(path, set(fresh))
    rows = [row for found in fresh.values() for row in found] + kept
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return Refreshed(
        source=source.name,
        path=path,
        num_offers={provider: len(found) for provider, found in fresh.items()},
        problems=problems,
        num_left_out=len(left_out),
        left_out=tuple(dict.fromkeys(left_out)),
        kept=f"{len(kept)} older rows of other providers are kept" if kept else None,
    )


def _read(
    source: Source, fetch: Fetch, provider: str, address: str, today: datetime.date
) -> tuple[list[Offer], list[str]]:
    """The best offers of one provider, so that a plan need not read thousands of rows, and what was left out."""
    version, as_of, rows = source.read(fetch, provider)
    shared = {"source": f"{source.name} {provider} {version} ({address})", "as_of": as_of}
    placed = ((f"{provider} row {number}", {**row, **shared}) for number, row in enumerate(rows, 1))
    offers, faults = parse_offers(placed)
    kept, rejected = check_offers(offers)
    if not kept:
        raise FinefitError(f"{provider}: no usable row")
    reasons = [fault.partition(": ")[2] for fault in faults]
    reasons += [f"{provider} {found.offer.instance}: {found.reason}" for found in rejected]
    return best_offers(kept, today), reasons


def _row(offer: Offer) -> dict[str, Any]:
    """An offer as a row that `parse_offer` reads back."""
    texts = (
        "provider",
        "region",
        "instance",
        "gpu",
        "num_gpus",
        "currency",
        "basis",
        "quality",
        "as_of",
        "source",
    )
    row = {name: getattr(offer, name) for name in (*texts, "note", "min_billing_s", "billing_step_s")}
    row["price"], row["spot"] = [offer.low, offer.high], offer.is_spot
    return {name: value for name, value in row.items() if value is not None}


def fetcher(address: str) -> Fetch:
    """How to get a file below an address. Raises UsageError for one that is neither a URL nor a folder."""
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    parts = urlsplit(address)
    # one letter before the colon is a drive of Windows
    is_url = len(parts.scheme) > 1
    if is_url and parts.scheme not in _SCHEMES:
        raise UsageError(f"--from {address}: expected http://, https://, file:// or a folder")
    if is_url and parts.scheme != "file":
        return lambda name: _download(f"{address.rstrip('/')}/{name}")
    folder = Path(url2pathname(parts.path)) if is_url else Path(address)
    if not folder.is_dir():
        raise UsageError(f"--from {address}: no such folder")
    return lambda name: _read_file(folder / name)


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return _limited(file.read(MAX_CATALOGUE_BYTES + 1), str(path))
    except OSError as error:
        raise FinefitError(f"can't read {path}: {error.strerror or error}") from error


def _download(url: str) -> bytes:
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(url, headers={"User-Agent": "finefit"}), timeout=TIMEOUT_S) as answer:
            # http.client raises IncompleteRead where less arrives than was announced
            announced, data = answer.headers.get("Content-Length"), answer.read(MAX_CATALOGUE_BYTES + 1)
    except (OSError, HTTPException) as error:
        raise FinefitError(f"can't read {url}: {error}") from error
    if announced is not None and announced.isdecimal() and len(data) < int(announced):
        raise FinefitError(f"can't read {url}: cut off after {len(data)} of {announced} bytes")
    return _limited(data, url)


def _limited(data: bytes, name: str) -> bytes:
    if len(data) > MAX_CATALOGUE_BYTES:
        raise FinefitError(f"{name}: larger than 256 MiB, so it is no price catalogue")
    return data


def _old_state(path: Path) -> str:
    if not path.exists():
        return "the prices that came with finefit stay in use"
    dates = sorted({str(row.get("as_of", "undated")) for row in parsed_rows(path)})
    return f"the snapshot in {path} stays as it is (prices of {', '.join(dates[-3:]) or 'no day'})"


def _old_rows(path: Path, providers: set[str]) -> list[dict[str, Any]]:
    """Rows of the old snapshot that no provider replaces."""
    replaced = {PROVIDER_NAMES.get(name, name) for name in providers}
    return [row for row in parsed_rows(path) if row.get("provider") not in replaced] if path.exists() else []
