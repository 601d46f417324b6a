"""Plans and training files as they are when something went wrong with them, or someone; a seed draws the same again."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from planner.errors import FinefitError
from planner.fields import FIELDS
from planner.methods import methods
from planner.optimizers import OPTIMIZERS
from planner.planfile import format_plan
from planner.setup import CHOICES
from tiny_llama import CONFIG, tiny_setup

VALUES = (
    *(
        "",
        "null",
        "~",
        "none",
        "true",
        "false",
        "yes",
        "auto",
        "-1",
        "0",
        "1",
        "2",
        "3.7",
        "1e400",
        "-1e400",
        "1e-400",
    ),
    *(
        ".nan",
        ".inf",
        "-.inf",
        "9" * 400,
        "0x10",
        "0o17",
        "1_000",
        "1:30",
        "190:20:30",
        "1e3",
        "'8'",
        "2e-4",
        "2026-11-22",
    ),
    *(
        "[]",
        "{}",
        "[1, [2, [3]]]",
        "[a, null, 1.5]",
        "{a: {b: {c: 1}}}",
        "[" * 40 + "]" * 40,
        "{" * 900,
        "[" * 900,
    ),
    *(
        '"\\0"',
        '"\\ud800"',
        '"\\x1b[31m"',
        '"a\\nb"',
        "好",
        "🦙" * 50,
        "\u202eevil",
        "'unterminated",
        '"half',
        "|",
        ">-",
    ),
    *(
        "../../../../etc/passwd",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "/",
        ".",
        "~root",
        "$HOME",
        "`id`",
        "C:\\x",
    ),
    *(
        "!!python/object/apply:os.system ['touch PWNED']",
        "!!binary aGk=",
        "!<tag:x> 1",
        "&a [*a]",
        "*x",
        "<<: {rank: 1}",
    ),
    *(
        "a: b: c",
        "- x",
        "? y",
        "# gone",
        "lora # a word behind",
        "x" * 100_000,
        "%s%n{0}",
        "<script>alert(1)</script>",
    ),
)
KEYS = (
    "rankk",
    "__class__",
    "model.config",
    "0",
    "null",
    "true",
    "好",
    "<<",
    "? [a]",
    "rank ",
    "RANK",
    "-",
    "seq-len",
    "gpu",
)
NUMBERS = ("1", "2", "3", "7", "64", "1024", "65536", "1048576", "4294967295")
FRACTIONS = ("0", "0.9", "1", "1e-6", "1e-9", "2e-4", "100", "1e6", "0.99", "10")
TEXTS = (
    *(
        "all-linear",
        "[q_proj]",
        "[nothing_like_it]",
        "main",
        "gpt2",
        "org/name",
        "org/name:train",
        "no/such/folder",
    ),
    *(
        "/dev/null",
        "/dev/zero",
        "/etc",
        "/proc/self/mem",
        "rows.csv",
        "hf",
        "transformers-4",
        "好",
        "-rf",
        "%s",
        "'; rm -rf /",
    ),
)
GPUS = (
    "rtx-4090",
    "local",
    "rtx-4090:0",
    "rtx-4090:-1",
    "h100-sxm:8",
    "h100-sxm:99999999999",
    "gpu",
    ":",
    "a100:a100",
)
CONFIG_VALUES = (
    None,
    -1,
    0,
    1,
    3,
    2**63,
    1e308,
    float("nan"),
    "64",
    [],
    [64],
    {},
    True,
    "../x",
    "llama",
    10**30,
)


def field_values(name: str) -> list[str]:
    """Words that are legal for a field by itself, extremes among them; together they can still contradict each other."""
    if name == "method":
        return list(methods())
    if name == "optimizer":
        return list(OPTIMIZERS)
    kind = FIELDS[name].kind
    if kind == "bool":
        return ["true", "false"]
    if name in CHOICES:
        return [str(choice) if choice is not None else "none" for choice in CHOICES[name]]
    return list({"int": NUMBERS, "float": FRACTIONS}.get(kind, TEXTS))


def broken_plan(draw: random.Random, folder: Path) -> bytes:
    """A plan that `finefit plan` could have written for the model and rows in `folder`, after one to four accidents."""
    models: tuple[Any, ...] = (str(folder / "model"), "llama-3.1-8b", _broken_config(draw))
    setup = tiny_setup(
        model=models[0], from_scratch=False, data=str(folder / "rows.jsonl"), seq_len=64, micro_batch_size=4
    )
    lines = format_plan(setup, draw.choice(GPUS[:2]), {"step_s": 1.0}).split("\n")
    if draw.random() < 0.4:
        _set(lines, "model", json.dumps(draw.choice(models[1:])))
    if draw.random() < 0.5:
        return "\n".join(_legal_values(draw, lines)).encode()
    for _ in range(draw.randint(1, 3)):
        lines = draw.choice(PLAN_ACCIDENTS)(draw, lines)
    data = "\n".join(lines).encode("utf-8", errors="surrogatepass")
    return draw.choice(BYTE_ACCIDENTS)(draw, data) if draw.random() < 0.25 else data


def _broken_config(draw: random.Random) -> dict[str, Any]:
    config = dict(CONFIG)
    for name in draw.sample(sorted(config), draw.randint(0, 2)):
        config[name] = draw.choice(CONFIG_VALUES)
    return config


def _set(lines: list[str], name: str, text: str) -> None:
    for number, line in enumerate(lines):
        if line.startswith(f"{name}:"):
            lines[number] = f"{name}: {text}"


def _other_value(draw: random.Random, lines: list[str]) -> list[str]:
    _set(lines, draw.choice([*FIELDS, "schema_version", "predicted"]), draw.choice(VALUES))
    return lines


def _legal_values(draw: random.Random, lines: list[str]) -> list[str]:
    for name in draw.sample(sorted(FIELDS), draw.randint(1, 5)):
        _set(lines, name, draw.choice(field_values(name)))
    return lines


def _other_gpu(draw: random.Random, lines: list[str]) -> list[str]:
    _set(lines, "gpu", draw.choice(GPUS))
    return lines


def _other_key(draw: random.Random, lines: list[str]) -> list[str]:
    lines.insert(draw.randrange(len(lines)), f"{draw.choice(KEYS)}: {draw.choice(VALUES)}")
    return lines


def _lost_line(draw: random.Random, lines: list[str]) -> list[str]:
    del lines[draw.randrange(len(lines))]
    return lines or [""]


def _line_twice(draw: random.Random, lines: list[str]) -> list[str]:
    lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    return lines


def _indented(draw: random.Random, lines: list[str]) -> list[str]:
    number = draw.randrange(len(lines))
    lines[number] = draw.choice((" ", "  ", "\t", "- ", "? ")) + lines[number]
    return lines


def _documents(draw: random.Random, lines: list[str]) -> list[str]:
    lines.insert(draw.randrange(len(lines)), draw.choice(("---", "...", "%YAML 9.9", "--- !x")))
    return lines


def _bomb(draw: random.Random, lines: list[str]) -> list[str]:
    bomb = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return bomb + lines


PLAN_ACCIDENTS: tuple[Callable[[random.Random, list[str]], list[str]], ...] = (
    *(_other_value,) * 6,
    _legal_values,
    _other_gpu,
    _other_key,
    _lost_line,
    _line_twice,
    _indented,
    _documents,
    _bomb,
)


def _cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _flip(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 5)):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _noise(draw: random.Random, data: bytes) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.randbytes(draw.randint(1, 40)) + data[place:]


def _recoded(draw: random.Random, data: bytes) -> bytes:
    text = data.decode("utf-8", errors="replace")
    return text.encode(draw.choice(("utf-16", "utf-8-sig", "utf-32", "gb18030", "cp500")), errors="replace")


def _line_ends(draw: random.Random, data: bytes) -> bytes:
    return data.replace(b"\n", draw.choice((b"\r", b"\r\n", b"\x00\n", b"\xc2\x85", b"\xe2\x80\xa8", b"")))


def _huge(draw: random.Random, data: bytes) -> bytes:
    return data + b"#" * 2**20


BYTE_ACCIDENTS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(_cut,) * 2,
    *(_flip,) * 3,
    _noise,
    _recoded,
    _line_ends,
    _huge,
)

ROWS = (
    '{"prompt": "n %(n)s", "completion": "%(n)s yes"}',
    '{"messages": [{"role": "user", "content": "n %(n)s"}, {"role": "assistant", "content": "%(n)s yes"}]}',
    '{"instruction": "n", "input": "%(n)s", "output": "%(n)s yes"}',
    '{"conversations": [{"from": "human", "value": "n %(n)s"}, {"from": "gpt", "value": "%(n)s yes"}]}',
    '{"text": "plain words of text %(n)s"}',
)
ODD_WORDS = (
    *(
        "",
        " ",
        "\\u0000",
        "\\ud800",
        "\\u202e",
        "好" * 300,
        "🦙",
        "long " * 400,
        "<|im_end|>",
        "<|im_start|>user\\n",
        "<pad>",
    ),
    *("\\u001b[31m", "{{ 7*7 }}", "{% for %}", "%s", "</s>", "\\r\\n" * 30, "null", "a\u0301" * 20),
)
NASTY_ROWS = (
    b"",
    b"null",
    b"NaN",
    b"[]",
    b"{}",
    b"[" * 5000,
    b'{"a":' * 3000 + b"1" + b"}" * 3000,
    b'{"prompt": 1e400, "completion": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\\ud800", "completion": "\\udfff"}',
    b'{"prompt": "\\u0000", "completion": "\\u202e<|im_end|><|im_start|>"}',
    b'{"prompt": null, "completion": ["a"]}',
    b'{"prompt": {"a": "b"}, "completion": true}',
    b'{"messages": []}',
    b'{"messages": [{"role": "assistant", "content": "b"}, {"role": "tool", "content": null}]}',
    b'{"messages": [{"role": "nobody", "content": "b"}, 3, null]}',
    b'{"messages": {"role": "user"}}',
    b'{"prompt": "a", "completion": ""}',
    b'{"prompt": "q", "completion": "' + b"long " * 400 + b'"}',
    b'{"chosen": "a", "rejected": 5, "prompt": "b"}',
    b"<html>not found</html>",
    b"PAR1\x00\x00PAR1",
    b"\x1f\x8b\x08\x00junk",
    b"PK\x03\x04",
    b'prompt,completion\n"a,b',
)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet", ".yaml", ".gz", "")


def broken_rows(draw: random.Random) -> tuple[bytes, str]:
    """A training file after some accidents, and the suffix that it bears."""
    shape = draw.choice(ROWS)
    rows = [shape % {"n": number} for number in range(draw.choice((0, 1, 2, 20, 20, 20)))]
    lines = [row.encode() for row in rows]
    for _ in range(draw.randint(0, 2)):
        number = draw.randrange(len(lines) + 1)
        lines.insert(number, draw.choice(NASTY_ROWS) if draw.random() < 0.3 else _odd_row(draw, shape))
    suffix = draw.choice(SUFFIXES) if draw.random() < 0.4 else ".jsonl"
    data = b"[" + b",".join(lines) + b"]" if suffix == ".json" and draw.random() < 0.7 else b"\n".join(lines)
    if draw.random() < 0.3:
        data = draw.choice(BYTE_ACCIDENTS[:-1])(draw, data)
    return data, suffix


def _odd_row(draw: random.Random, shape: str) -> bytes:
    """A row whose words are legal and unusual, or in which a value has another type."""
    row = shape % {"n": draw.choice(ODD_WORDS)}
    if draw.random() < 0.3:
        places = ('"n"', '"user"', '"human"', '"n ', "[{")
        row = row.replace(draw.choice(places), draw.choice(("7", "null", "[]", '"')), 1)
    return row.encode(errors="replace")


_WORDS_OF_A_CRASH = re.compile(r"Traceback|unexpected error|Error\b.*line \d+, in ")


def fault_of(code: int, said: str) -> str | None:
    """What is wrong with how a command ended: anything but an answer or one line with an exit code of the contract."""
    if _WORDS_OF_A_CRASH.search(said):
        return said[-400:]
    if code not in (0, 1, 2, 3):
        return f"exit code {code}"
    errors = [line for line in said.splitlines() if line.startswith("finefit: ")]
    if code in (1, 2) and (len(errors) != 1 or said.splitlines()[-1] != errors[0]):
        return f"not one line of error: {said[-400:]!r}"
    return None


class Ordeal:
    """Broken plans and files through the real commands in this process; `folder` holds model/ and rows.jsonl.

    `train` ends where it would build the model. What is written must be whole, and nothing where a command failed.
    """

    REACHED = "the model would be built now"

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.out = folder / "out"

    def plans(self, first: int, last: int) -> None:
        """Plans number `first` to `last`, one command each in turn."""
        path = self.folder / "broken.yaml"
        for number in range(first, last):
            draw = random.Random(f"{self.seed} plan {number}")
            path.write_bytes(broken_plan(draw, self.folder))
            name = list(COMMANDS)[number % len(COMMANDS)]
            self._try(
                f"plan {number}", name, [word.format(plan=path, out=self.out) for word in COMMANDS[name]]
            )

    def files(self, first: int, last: int) -> None:
        """Training files of these numbers, through `finefit train` up to the model."""
        setup = tiny_setup(model=str(self.folder / "model"), from_scratch=False, data="x", seq_len=64)
        plan = self.folder / "plan.yaml"
        plan.write_text(format_plan(setup, "local", {}))
        for number in range(first, last):
            draw = random.Random(f"{self.seed} file {number}")
            data, suffix = broken_rows(draw)
            path = self.folder / f"broken{suffix}"
            path.write_bytes(data)
            words = [word.format(plan=plan, out=self.out) for word in COMMANDS["train"]]
            objective = draw.choice(("sft", "sft", "pretrain"))
            words += ["--set", f"data={path}", "--set", f"objective={objective}"]
            self._try(f"file {number}", "train", words)
            path.unlink()

    def _try(self, what: str, name: str, words: list[str]) -> None:
        from bench import train
        from bench.cli import run

        def reached(*_: Any, **__: Any) -> None:
            raise FinefitError(self.REACHED)

        build_model, train.build_model = train.build_model, reached
        said, answer = StringIO(), StringIO()
        try:
            with redirect_stderr(said), redirect_stdout(answer):
                code = run(words)
        except BaseException as error:
            code, said = -1, StringIO(f"Traceback: {type(error).__name__}: {error}")
        finally:
            train.build_model = build_model
        has_reached = self.REACHED in said.getvalue()
        self.counts["the model" if has_reached else f"{name}: {code}"] += 1
        fault = fault_of(code, said.getvalue()) or self._litter(code, has_reached)
        if fault:
            self.faults.append(f"{what}, {name}: {fault}")
        shutil.rmtree(self.out, ignore_errors=True)

    def _litter(self, code: int, has_reached: bool) -> str | None:
        if Path("PWNED").exists():
            return "a plan was executed"
        there = sorted(path.name for path in self.out.iterdir()) if self.out.exists() else []
        halves = [name for name in there if name.startswith(".")]
        if halves or (there and code != 0) or (code == 0 and self.out.exists() and not there):
            return f"exit code {code} and {there} in the output folder"
        return None


COMMANDS = {
    "train": ("train", "{plan}", "--out", "{out}", "--device", "cpu", "--force"),
    "estimate": ("estimate", "{plan}"),
    "export to trl": ("export", "{plan}", "--to", "trl", "--out", "{out}"),
    "estimate --json": ("estimate", "{plan}", "--json"),
    "export to deepspeed": ("export", "{plan}", "--to", "deepspeed", "--out", "{out}"),
    "export to accelerate": ("export", "{plan}", "--to", "accelerate", "--out", "{out}"),
}
