"""Make data/chatterbot-*.jsonl from the PyPI package chatterbot-corpus: `python scripts/make_sample_data.py`.

The same package version always gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import yaml

from planner.files import write_atomically

DATA = Path(__file__).resolve().parent.parent / "data"
LANGUAGES = {"en": "english", "zh": "chinese"}
ALTERNATIVES = {("english", "computers.yml"), ("english", "emotion.yml")}
"""Files whose entries are one question with several answers; elsewhere an entry is a dialogue."""


def main() -> None:
    """Write one file per language."""
    for code, folder in LANGUAGES.items():
        rows = [json.dumps(row, ensure_ascii=False) for row in make_rows(folder)]
        unique = dict.fromkeys(rows)
        write_atomically(DATA / f"chatterbot-{code}.jsonl", "\n".join(unique) + "\n")
        print(f"chatterbot-{code}.jsonl: {len(unique)} rows ({len(rows) - len(unique)} duplicates removed)")


def make_rows(folder: str) -> Iterator[dict[str, object]]:
    """The rows of a language in the order of its files; entries that aren't two or more texts are left out."""
    corpus = resources.files("chatterbot_corpus") / "data" / folder
    for file in sorted(corpus.iterdir(), key=lambda f: f.name):
        has_alternatives = (folder, file.name) in ALTERNATIVES
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            turns = [clean(turn) for turn in entry] if isinstance(entry, list) else []
            if len(turns) < 2 or not all(turns):
                continue
            if has_alternatives:
                yield from (make_row([turns[0], answer]) for answer in turns[1:])
            else:
                yield make_row(turns)


def clean(turn: str) -> str:
    """Without blanks at the ends; runs of blanks become one, except in text of several lines (code)."""
    text = turn.strip()
    return text if "\n" in text else " ".join(text.split())


def make_row(turns: list[str]) -> dict[str, object]:
    """The last question with its answer; what was said before is the history. A last question alone is cut."""
    turns = turns[: len(turns) // 2 * 2]
    history = [[turns[i], turns[i + 1]] for i in range(0, len(turns) - 2, 2)]
    row: dict[str, object] = {"instruction": turns[-2], "input": "", "output": turns[-1]}
    return row | ({"history": history} if history else {})


if __name__ == "__main__":
    main()
