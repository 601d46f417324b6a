"""What `pip install finefit` gives: the built wheel in an environment without torch, used from another folder."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "packaging")
NEEDS_THE_SOURCE = ("test_architecture.py", "test_failures.py", "test_wheel.py")
"""Test files about the repository itself."""
NOT_COPIED = ("src", "runs", "build", "dist")


def run(*command: object, cwd: Path, check: bool = False) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 or not check, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def needed_distributions(names: list[str]) -> set[str]:
    """The named distributions and all that they need, extras left out, as they are installed here."""
    found: set[str] = set()
    while names:
        name = names.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        wanted = (Requirement(text) for text in importlib.metadata.requires(name) or ())
        names += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def copy_distribution(name: str, site_packages: Path) -> None:
    """Install a package without a network: copy its files from this environment."""
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            target = site_packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(distribution.locate_file(file), target)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Without the build's back end here, `build` fetches it, as pip would.
    isolation = () if importlib.util.find_spec("hatchling") is None else ("--no-isolation",)
    run(
        sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", folder, ROOT, cwd=folder, check=True
    )
    (found,) = folder.glob("finefit-*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The `bin` folder of an environment that holds the wheel, what it requires, and the tools for tests."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder, check=True)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python", "install")
    run(*pip, "--no-index", "--no-deps", wheel, cwd=folder, check=True)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    requirements = importlib.metadata.PathDistribution.discover(name="finefit", path=[str(site_packages)])
    own = [Requirement(text) for found in requirements for text in found.requires or ()]
    names = [r.name for r in own if r.marker is None or r.marker.evaluate({"extra": ""})]
    for name in sorted(needed_distributions([*names, *TEST_TOOLS])):
        copy_distribution(name, site_packages)
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path):
    return tmp_path


def test_the_wheel_requires_no_deep_learning_stack(environment, elsewhere):
    script = "import importlib.util as u; print(*[m for m in ('torch', 'numpy', 'transformers') if u.find_spec(m)])"
    assert run(environment / "python", "-c", script, cwd=elsewhere, check=True).stdout.strip() == ""


@pytest.mark.parametrize(
    "command", ["fits rtx-4090", "list gpus", "list formats", "--version", "fits --help"]
)
def test_planner_s_commands_answer_from_another_folder(command, environment, elsewhere):
    done = run(environment / "finefit", *command.split(), cwd=elsewhere)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_a_command_that_needs_the_training_extra_says_so_in_one_line(environment, elsewhere):
    plan = elsewhere / "plan.yaml"
    plan.write_text("model: smollm2-135m-instruct\ngpu: rtx-4090\nseq_len: 128\n")
    done = run(environment / "finefit", "bench", plan, cwd=elsewhere)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'finefit[train]'" in done.stderr


def test_planner_s_own_tests_pass_on_the_wheel(environment, elsewhere):
    """All of the repository but its source: what the tests import comes from the wheel."""
    for path in ROOT.iterdir():
        if path.name in NOT_COPIED or path.name.startswith("."):
            continue
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", *NEEDS_THE_SOURCE)
            shutil.copytree(path, elsewhere / path.name, ignore=ignored)
        else:
            shutil.copy(path, elsewhere / path.name)
    python = environment / "python"
    done = run(
        python, "-m", "pytest", "-m", "not slow and not train", "-p", "no:cacheprovider", cwd=elsewhere
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
