"""Laws of the code: who may import whom, how long things may be, what a name of a number must say."""

import ast
import dataclasses
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

import planner.results
import planner.setup
import planner.specs

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
FILES = sorted(SRC.rglob("*.py"))
PLANNER_FILES = [p for p in FILES if p.is_relative_to(SRC / "planner")]

MAX_CODE_LINES = 300
MAX_FUNCTION_LINES = 60
THIRD_PARTY_OF_PLANNER = {"click", "tabulate", "yaml"}
OPTIONAL = {"shapes.py": {"numpy"}}
"""What a module uses where it is installed."""

LAYERS = (
    (
        "errors",
        "units",
        "specs",
        "sizes",
        "stack",
        "zero_replay",
        "render",
        "dataset_turns",
        "price_dates",
        "conformal",
        "packing",
    ),
    ("lengths", "dataset_preferences"),
    ("operations", "sharding", "render_plot", "dataset_formats"),
    ("backward", "work"),
    ("tape",),
    ("shapes",),
    (
        "files",
        "plain_yaml",
        "contexts",
        "layering",
        "setup",
        "hub",
        "gpu_names",
        "dimensions",
        "dataset_files",
        "optimizers",
        "kernels",
        "pointwise",
    ),
    ("index", "fields", "results", "dataset", "own_kernels"),
    ("linears",),
    ("latent", "char_lengths", "methods"),
    ("families",),
    (
        "catalog",
        "coefficients",
        "card_prices",
        "planfile",
        "recipes",
        "checks",
        "cases",
        "heads",
        "blocks",
        "money",
        "run_length",
    ),
    (
        "hf_config",
        "layers",
        "two_stacks",
        "offers",
        "tariffs",
        "user_prices",
        "price_sources",
        "price_snapshot",
    ),
    ("resolve", "inventory", "price_checks", "cost"),
    ("zero_calls",),
    ("exchange", "price_book"),
    ("lowering", "price_refresh"),
    ("rank", "prices"),
    ("phases",),
    ("residuals", "pressure", "rates", "traffic"),
    ("memory", "throughput", "uncertainty", "calibration"),
    ("timing",),
    ("estimate",),
    ("run_time", "places", "quality", "tactics", "sizing", "kept_traces", "gains"),
    ("fitting",),
    ("search", "fits", "by_length", "accuracy", "export", "costs", "options", "speed_accuracy"),
    ("needs", "facts", "render_estimate", "cli_options", "optimise", "coverage", "cost_options", "claims"),
    (
        "api",
        "search_options",
        "render_tables",
        "render_accuracy",
        "render_costs",
        "render_run",
        "render_speed",
        "render_claims",
        "claim_rules",
    ),
    ("cli_tables", "cli_accuracy", "render_search"),
    ("cli_plan",),
    ("cli_costs", "cli_prices", "cli_claims", "cli_search"),
    ("cli",),
)
"""planner from the bottom up. A module may import from layers below its own, and never from its own layer."""

LIGHT_FILES = ("bench/__init__.py", "bench/cli.py")


def relative(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> list[str]:
    """Dotted names of all imports below a node, those inside functions too."""
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found += [alias.name for alias in child.names]
        if isinstance(child, ast.ImportFrom):
            assert not child.level, "relative imports hide where a module lies"
            found += [f"{child.module}.{alias.name}" for alias in child.names]
    return found


def unit(dotted: str) -> str:
    """The part of planner that a dotted name belongs to: `planner.export.trl.export` -> `export`."""
    return dotted.split(".")[1]


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    numbers: set[int] = set()
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            numbers.update(range(token.start[0], token.end[0] + 1))
    return len(numbers - docstring_lines(ast.parse(text)))


def docstring_lines(module: ast.Module) -> set[int]:
    """Lines of all bare strings, which are docstrings of modules, classes, functions and constants."""
    return {
        line
        for node in ast.walk(module)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


@pytest.mark.parametrize("path", PLANNER_FILES, ids=relative)
def test_planner_imports_nothing_but_the_standard_library_and_three_packages(path):
    allowed = (
        set(sys.stdlib_module_names) | THIRD_PARTY_OF_PLANNER | {"planner"} | OPTIONAL.get(path.name, set())
    )
    assert {name.split(".")[0] for name in imports(tree(path))} <= allowed


def test_every_part_of_planner_has_its_layer():
    parts = {p.relative_to(SRC / "planner").parts[0].removesuffix(".py") for p in PLANNER_FILES}
    listed = [name for layer in LAYERS for name in layer]
    assert len(listed) == len(set(listed))
    assert parts - {"__init__", "__main__"} == set(listed)


@pytest.mark.parametrize("path", PLANNER_FILES, ids=relative)
def test_imports_inside_planner_go_downwards(path):
    own = path.relative_to(SRC / "planner").parts[0].removesuffix(".py")
    if own == "__init__":
        assert not [name for name in imports(tree(path)) if name.startswith("planner.")]
        return
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for name in imports(tree(path)):
        is_planner = name.startswith("planner.") and name != "planner.__version__"
        if is_planner and unit(name) != own:
            assert level[unit(name)] < level[own], f"{own} imports {unit(name)}"


@pytest.mark.parametrize("name", LIGHT_FILES)
def test_the_command_line_imports_nothing_heavy_at_module_level(name):
    allowed = set(sys.stdlib_module_names) | THIRD_PARTY_OF_PLANNER | {"planner", "bench"}
    module_level = [n for n in tree(SRC / name).body if isinstance(n, ast.Import | ast.ImportFrom)]
    for node in module_level:
        assert {n.split(".")[0] for n in imports(node)} <= allowed


def test_starting_the_command_line_loads_no_heavy_package():
    script = "import sys, bench.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "numpy",
        "yaml",
        "psutil",
        "pynvml",
    }
    assert not heavy & set(run.stdout.split())


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_short(path):
    assert code_lines(path) <= MAX_CODE_LINES


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_functions_are_short(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_what_is_public_says_what_it_is(path):
    assert ast.get_docstring(tree(path)), "the module has no docstring"
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


# ------------------------------------------------------------- numbers

UNITS = ("_bytes", "_s", "_per_s", "_w", "_usd", "_cny")
COUNTS = {
    # elements, features, layers, heads
    *("in_features", "out_features", "copies", "count", "norm_params", "embedding_params"),
    *("token_embedding_params", "final_params", "hidden_size", "vocab_size", "max_positions", "window"),
    *("head_dim", "value_head_dim", "experts_per_token"),
    # sequences and tokens, as DESIGN-wide names: micro_batch_size counts sequences, seq_len tokens
    *(
        "eval_batch_size",
        "micro_batch_size",
        "grad_accum_steps",
        "seq_len",
        "warmup_steps",
        "max_steps",
        "epochs",
    ),
    "rank",
}
RATIOS = {
    *("token_share", "probability", "level", "mfu", "eval_fraction", "dropout", "alpha"),
    *("learning_rate", "weight_decay", "max_grad_norm", "dpo_beta"),
}
MAPS = {
    "phases": "bytes by phase",
    "terms": "bytes by term",
    "bound": "seconds by resource",
    "flops": "FLOP/s by dtype",
}
LABELS = {"seed", "compute_capability", "_hash", "order"}


def numeric_fields() -> list[tuple[str, str]]:
    found = []
    for module in (planner.specs, planner.results, planner.setup):
        for value in vars(module).values():
            if dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                found += [
                    (value.__name__, f.name) for f in dataclasses.fields(value) if is_numeric(str(f.type))
                ]
    return found


def is_numeric(annotation: str) -> bool:
    return bool(re.search(r"\b(int|float)\b", annotation))


@pytest.mark.parametrize(("owner", "name"), numeric_fields())
def test_a_number_s_name_says_its_unit(owner, name):
    is_declared = name in COUNTS | RATIOS | LABELS or name in MAPS or name.startswith("num_")
    assert is_declared or name.endswith(UNITS)


def test_no_declared_number_is_out_of_date():
    names = {name for _, name in numeric_fields()}
    assert COUNTS | RATIOS | LABELS | set(MAPS) <= names


# ------------------------------------------------------------- what the repository says


def repository_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        return []
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


# Written apart, so that this file doesn't break its own law.
PRIVATE = re.compile(
    "|".join(
        (
            r"(?<![\w.])/(?:root|tmp|work)/",
            r"(?<![\w.])/home/[a-z]",
            "/" + "Users/[A-Za-z]",
            "pypi" + r"\.org",
            "pythonhosted" + r"\.org",
            "registry" + r"\.npmjs",
            "deb" + r"\.debian\.org",
        )
    )
)


def test_no_file_names_a_private_path_or_a_registry_s_host():
    files = repository_files()
    if not files:
        pytest.skip("not a git checkout: which files belong to the project is unknown")
    offenders = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        offenders += [f"{path.relative_to(ROOT)}: {m.group()}" for m in PRIVATE.finditer(text)]
    assert not offenders


def test_the_make_file_s_scripts_exist_and_can_be_run():
    for name in re.findall(r"(?:scripts|benchmarks)/[\w.]+", (ROOT / "Makefile").read_text()):
        path = ROOT / name
        assert path.is_file(), name
        assert path.suffix != ".sh" or path.stat().st_mode & 0o111, name
