"""config.json from the local Hugging Face cache or from a hub: the only place where planner uses a network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import ConfigError, FinefitError

MAX_CONFIG_BYTES = 2**20
"""Real config.json files are a few kilobytes; more is a mistake or an attack."""
TIMEOUT_S = 10.0
HUGGING_FACE = "https://huggingface.co"
MODELSCOPE_DOMAIN = "www.modelscope.cn"
CODE_KEY = "code_sha256"
"""Key of a config for the digest of the Python files beside it, on which a trace of its model depends."""
_YES = {"1", "ON", "YES", "TRUE"}


def read_config(path: Path) -> Mapping[str, Any]:
    """The JSON object in a config.json; with CODE_KEY where the model brings code of its own. Raises ConfigError naming the file."""
    try:
        with path.open("rb") as file:
            config = parse_config(file.read(MAX_CONFIG_BYTES + 1), str(path))
        return {**config, CODE_KEY: _code_digest(path.parent)} if config.get("auto_map") else config
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror or error}") from error


def _code_digest(folder: Path) -> str:
    """What tells versions of a model's own code apart; it is read, never run."""
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def parse_config(content: bytes, where: str) -> Mapping[str, Any]:
    """The JSON object in `content`. Raises ConfigError for anything else, also for more than 1 MiB."""
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where}: more than 1 MiB is no model's config.json")
    try:
        config = json.loads(content)
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({str(error).splitlines()[0]:.80})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: not a JSON object")
    return config


def cached_config(hub_id: str, revision: str | None) -> Path | None:
    """The newest config.json of `hub_id` in the local Hugging Face cache (HF_HUB_CACHE, HF_HOME), if any."""
    folder = _cache_folder() / f"models--{hub_id.replace('/', '--')}"
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    reference = folder / "refs" / (revision or "main")
    wanted = reference.read_text().strip() if reference.is_file() else revision
    pattern = f"{wanted}/config.json" if wanted else "*/config.json"
    found = sorted(snapshots.glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _cache_folder() -> Path:
    hub = os.environ.get("HF_HUB_CACHE")
    if hub:
        return Path(hub).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(home).expanduser() / "hub"


def is_offline() -> bool:
    """Whether the user forbade the hub (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _YES


def uses_modelscope() -> bool:
    """Whether models come from ModelScope (USE_MODELSCOPE_HUB)."""
    return os.environ.get("USE_MODELSCOPE_HUB", "").upper() in _YES


def config_url(hub_id: str, revision: str | None) -> str:
    """Where `hub_id`'s config.json is: HF_ENDPOINT, or MODELSCOPE_DOMAIN under USE_MODELSCOPE_HUB."""
    from urllib.parse import quote

    if uses_modelscope():
        domain = os.environ.get("MODELSCOPE_DOMAIN") or MODELSCOPE_DOMAIN
        base = domain if "://" in domain else f"https://{domain}"
        query = f"Revision={quote(revision or 'master', safe='')}&FilePath=config.json"
        return f"{base.rstrip('/')}/api/v1/models/{quote(hub_id)}/repo?{query}"
    endpoint = (os.environ.get("HF_ENDPOINT") or HUGGING_FACE).rstrip("/")
    return f"{endpoint}/{quote(hub_id)}/resolve/{quote(revision or 'main', safe='')}/config.json"


def fetch_config(hub_id: str, revision: str | None) -> Mapping[str, Any]:
    """Download `hub_id`'s config.json (10 s at most). Raises FinefitError when that can't be done.

    HF_TOKEN goes to huggingface.co alone: neither to a mirror nor along a redirect.
    """
    if is_offline():
        raise FinefitError(
            f"{hub_id} is in no profile and not in the local cache, and HF_HUB_OFFLINE=1 forbids the hub: "
            f"give a folder or a config.json"
        )
    import http.client
    from urllib.error import HTTPError

    url = config_url(hub_id, revision)
    if not url.startswith(("https://", "http://")):
        raise FinefitError(f"{url}: the hub's address must begin with https:// or http://")
    try:
        return parse_config(_download(url), url)
    except HTTPError as error:
        raise FinefitError(_refusal(hub_id, url, error.code)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise FinefitError(
            f"can't fetch {url}: {reason}; without a network give a folder or a config.json"
        ) from None


def _download(url: str) -> bytes:
    from urllib.request import Request, urlopen

    request = Request(url, headers={"User-Agent": "finefit"})
    token = os.environ.get("HF_TOKEN")
    if token and url.startswith(f"{HUGGING_FACE}/"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urlopen(request, timeout=TIMEOUT_S) as response:
        content: bytes = response.read(MAX_CONFIG_BYTES + 1)
        return content


_REFUSALS = {
    401: "it doesn't exist, or needs a login (set HF_TOKEN)",
    403: "its owner grants access on request (set HF_TOKEN of an account that has it)",
    404: "no such model or revision, or it has no config.json",
    429: "too many requests; try again later",
}


def _refusal(hub_id: str, url: str, status: int) -> str:
    reason = _REFUSALS.get(status, "the server refused")
    return f"can't fetch the config.json of {hub_id} from {url}: HTTP {status}, {reason}"
