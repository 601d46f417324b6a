from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from planner.dataset import dataset_facts

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
README = (DATA / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(DATA.glob("*.jsonl")), ids=lambda p: p.name)
def test_shipped_rows_are_clean_and_counted_in_the_readme(path: Path) -> None:
    facts = dataset_facts(path)
    assert facts.num_duplicate_rows == 0
    assert facts.ignored_columns == ()
    [stated] = re.findall(rf"`{path.name}` \| ([\d,]+)", README)
    assert int(stated.replace(",", "")) == facts.num_rows


def test_there_is_a_data_set_of_a_thousand_rows_with_its_licence() -> None:
    assert dataset_facts(DATA / "chatterbot-en.jsonl").num_rows >= 1000
    assert "Redistributions of source code must retain" in (DATA / "LICENSE-chatterbot").read_text()


@pytest.mark.skipif(not importlib.util.find_spec("chatterbot_corpus"), reason="needs chatterbot-corpus")
def test_the_script_makes_the_shipped_bytes(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_sample_data.py"))
    script["main"].__globals__["DATA"] = tmp_path
    script["main"]()
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in DATA.glob("chatterbot-*.jsonl")}
