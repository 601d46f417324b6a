"""What every test gets: no network, folders of its own, and a skip where the training extra is missing.

Nothing here may import torch: planner's tests run in an environment without it.
"""

from __future__ import annotations

import ast
import errno
import importlib
import importlib.util
import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from planner.setup import TrainSetup

HAS_TORCH = importlib.util.find_spec("torch") is not None
_SESSION_FOLDERS = ("FINEFIT_CACHE", "XDG_CACHE_HOME", "HF_HOME")
_TEST_FOLDERS = ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME")
_ROOT = pytest.StashKey[Path]()
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def pytest_configure(config: pytest.Config) -> None:
    """Caches are shared by one session's tests (converting a model is slow) and never the user's."""
    root = Path(tempfile.mkdtemp(prefix="finefit-tests-"))
    config.stash[_ROOT] = root
    for name in _SESSION_FOLDERS:
        os.environ[name] = str(root / name.lower())
    os.environ.update(_OFFLINE)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _ROOT in config.stash:
        shutil.rmtree(config.stash[_ROOT], ignore_errors=True)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without torch, leave out the files that can't even be imported; `None` lets pytest decide."""
    if HAS_TORCH or collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    return True if _needs_training_extra(collection_path) else None


def _needs_training_extra(path: Path) -> bool:
    """Whether the whole file is marked `train`, or can't be imported for want of an installed package."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and "mark.train" in ast.unparse(node.value):
            return True
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        if any(_is_out_of_reach(name) for name in names):
            return True
    return False


def _is_out_of_reach(module: str) -> bool:
    """Whether importing a module fails for want of a package that isn't finefit's own."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return not str(error.name).startswith(("planner", "bench"))
    return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_TORCH:
        return
    for item in items:
        if item.get_closest_marker("train"):
            item.add_marker(pytest.mark.skip(reason="torch is not installed: pip install 'finefit[train]'"))


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test writes for the user (calibration, settings) is gone with it."""
    root = tmp_path_factory.mktemp("user")
    for name in _TEST_FOLDERS:
        monkeypatch.setenv(name, str(root / name.lower()))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and rows, for whole runs."""
    from whole_runs import save_tiny_folder

    return save_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def plan(tiny: Path) -> Callable[..., TrainSetup]:
    """A plan of a short run of it, with fields changed by name."""
    from whole_runs import make_plan

    return partial(make_plan, tiny)


def _is_here(host: object) -> bool:
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections and name look-ups outside loopback fail as on a machine without a network."""
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(sock: socket.socket, address: object) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(address[0]):
            raise OSError(errno.ENETUNREACH, f"no network in tests: {address!r}")

    def guarded_connect(self: socket.socket, address: object) -> None:
        check(self, address)
        return connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: object) -> int:
        check(self, address)
        return connect_ex(self, address)

    def guarded_lookup(host: object, *rest: object, **options: object) -> object:
        name = host.decode() if isinstance(host, bytes) else host
        if not _is_here(name) and name not in ("0.0.0.0", "::"):
            raise socket.gaierror(socket.EAI_NONAME, f"no network in tests: {name}")
        return lookup(host, *rest, **options)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)
