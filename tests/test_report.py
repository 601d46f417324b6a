"""Reports: the answer first, every picture in words, nothing from outside, and no name that becomes markup."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from bench.cli import run
from bench.jobs import FakeExecutor
from bench.labels import describe, differing
from bench.measure import measure
from bench.protocol import StepProtocol
from bench.report.content import Report
from bench.report.money_figures import Offer, pareto
from bench.report.page import to_html, to_markdown
from bench.report.results import bench_command_of, results_report
from bench.store import Measured, Measurement, Samples, append_result
from planner.cli_options import Session
from planner.planfile import write_plan
from planner.setup import TrainSetup

HOSTILE = '<script>alert("x")</script> & $x^{ ![a](b) **c**\x1b[31m'
SETUP = TrainSetup(model="smollm2-135m", seq_len=64)
GIB = 2**30


@pytest.fixture(scope="module")
def swept() -> list[Measurement]:
    executor = FakeExecutor(max_tokens=300)
    predicted = {
        "memory": {
            "peak_allocated_bytes": 70_000,
            "terms": {"weights": 40_000, "context": 5},
            "phases": {"backward": 66_000},
        },
        "fit": {"usable_bytes": 100_000},
        "time": None,
        "traced": {
            "timeline": [{"phase": "forward", "live_bytes": [1, 2]}, {"phase": "backward", "live_bytes": [3]}]
        },
    }
    protocol = StepProtocol.of(warmup=2, steps=6)
    return [
        measure(
            SETUP.with_(micro_batch_size=size, seq_len=length),
            protocol=protocol,
            predicted=predicted,
            gpu="rtx-4090",
            executor=executor,
        )
        for size in (1, 2, 4)
        for length in (32, 64, 128)
    ]


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are filled but not rendered, which takes most of a report's time."""
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write(b"<svg ></svg>")
    )


class Page(HTMLParser):
    """Tags, ids, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value] += 1
            is_outside = name in ("src", "href", "xlink:href", "data", "action") and value[:1] not in "#"
            if is_outside and value != "data:,":
                self.fetched.append(value)
            assert not name.startswith("on"), "a handler runs code"


@pytest.fixture(scope="module")
def drawn(swept) -> tuple[Report, str]:
    """A sweep's report, and its page with rendered pictures."""
    report = results_report(swept, ["r:2: left out: torn"], "results.jsonl", "made")
    return report, to_html(report)


def test_a_sweep_s_report_answers_first_and_fetches_nothing(drawn, swept):
    report, html = drawn
    page = Page(html)
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    assert body.index(report.question) < body.index(report.answer[:40]) < body.index("<svg")
    assert "8 of 9 runs ended well, 1 ended with oom" in report.answer
    assert page.fetched == [] and "url(http" not in html and "@import" not in html
    assert page.tags["script"] == 0 and page.tags["svg"] == page.tags["desc"] == page.tags["figure"] >= 5
    assert "out of memory" in html and bench_command_of(swept[0]) in html


def test_references_inside_the_pictures_stay_their_own(drawn):
    _, html = drawn
    defined = set(re.findall(r'id="([^"]+)"', html))
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | set(re.findall(r'xlink:href="#([^"]+)"', html))
    assert used <= defined
    assert all(html.count(f'id="{name}"') == 1 for name in used)


def test_names_with_markup_are_shown_and_do_nothing(swept):
    setup = SETUP.with_(model={"model_type": "llama", "_name_or_path": HOSTILE})
    hostile = replace(
        swept[0],
        id=HOSTILE,
        setup=setup,
        gpu=HOSTILE,
        error=HOSTILE,
        warnings=(HOSTILE,),
        environment={"cpu_model": HOSTILE, "versions": {HOSTILE: HOSTILE}, "machine_id": HOSTILE},
        timeline=((HOSTILE, (1, 2, 3)),),
        watched={"at_s": [0, 1], "phase": [HOSTILE, 7], "rss_bytes": [1, 2]},
        measured=replace(swept[0].measured, phases={HOSTILE: 5}),
    )
    for runs in ([hostile], [hostile, replace(hostile, outcome="oom", last_phase=HOSTILE)]):
        report = results_report(runs, [HOSTILE], HOSTILE, HOSTILE)
        html, markdown = to_html(report), to_markdown(report)
        page = Page(html)
        assert page.tags["script"] == 0 and page.tags["img"] == 0 and "\x1b" not in html
        assert "&lt;script&gt;" in html
        prose = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
        assert "<script" not in prose.replace("\\<", "") and "![a]" not in prose


@pytest.mark.parametrize(
    "changes",
    [
        {"predicted": {"memory": 5, "fit": [], "traced": {"timeline": "x"}, "time": {"step_s": "x"}}},
        {"watched": {"at_s": ["x"], "rss_bytes": [1]}},
        {"watched": {"rss_bytes": [1, None]}},
        {
            "watched": {
                "at_s": [0, "x", 2],
                "phase": [1, 2, 3],
                "power_w": [5, 1, 7],
                "cpu_busy_share": [0, 1, 1],
            }
        },
        {"environment": {"ram_bytes": "much", "versions": 3, "max_temperature_c": "hot", "gpu_name": ["x"]}},
        {"samples": Samples(step_wall_s=(0.0,) * 3, losses=(None,) * 3), "measured": Measured(step_s=0.0)},
        {"measured": Measured(peak_allocated_bytes=2**62, phases={"a": 2**62}, tokens_per_s=1e18)},
        {"protocol": {"random_weights": "yes"}, "device": "tpu"},
    ],
)
def test_a_strange_record_is_reported_as_far_as_it_goes(swept, changes, sketched):
    assert "</html>" in to_html(results_report([replace(swept[0], **changes)], [], "r", "made"))


def test_mixed_machines_and_lines_left_out_are_said(swept, sketched):
    other = replace(
        swept[1], environment={**swept[1].environment, "machine_id": "zz", "versions": {"torch": "1"}}
    )
    report = results_report([swept[0], other], ["r:3: left out: torn"], "r", "made")
    assert report.tone == "doubtful"
    assert any("2 machines" in line for line in report.doubts) and any(
        "versions" in line for line in report.doubts
    )
    assert "left out: torn" in to_html(report)
    twin = replace(other, setup=swept[0].setup, measured=replace(swept[0].measured, tokens_per_s=7.0))
    report = results_report([swept[0], swept[1], twin], [], "r", "made")
    speed = next(section.blocks[0] for section in report.sections if section.title == "Speed")
    assert "zz: 7 at 32" in speed.alt and "measured 2 times" not in report.answer


def test_runs_that_differ_in_anything_are_told_apart(swept, sketched):
    runs = [
        replace(run, setup=run.setup.with_(weights_dtype=dtype, rank=rank))
        for run in swept
        for dtype, rank in (("bfloat16", 8), ("float32", 8), ("float32", 64))
    ]
    report = results_report(runs, [], "r", "made")
    (table,) = next(section.blocks for section in report.sections if section.title == "All runs")
    names = [row[0] for row in table.rows]
    assert len(set(names)) == len(names) == 27 and "rank 64, weights_dtype float32" in names[2]
    speed = next(section.blocks[0] for section in report.sections if section.title == "Speed")
    assert "batch 1, rank 8, weights_dtype bfloat16: " in speed.alt and "2 more curves" in speed.alt


def test_what_hardly_bears_on_a_step_is_named_only_where_nothing_else_differs():
    plain = SETUP.with_(seed=1, data="folder/rows.jsonl")
    assert differing([plain, plain]) == ()
    assert differing([plain, plain.with_(seed=2, rank=4)]) == ("rank",)
    assert differing([plain, plain.with_(seed=2)]) == ("seed",)
    three = [plain, plain.with_(rank=4), plain.with_(data="b.jsonl")]
    assert differing(three) == ("data", "rank")
    assert describe(three[0], differing(three)).endswith(f"data rows.jsonl, rank {plain.rank}")


def test_a_setup_that_was_measured_often_is_shown_by_its_median_run(swept, sketched):
    speeds = (90.0, 300.0, 100.0, 110.0, 20.0)
    runs = [
        replace(swept[0], measured=replace(swept[0].measured, tokens_per_s=speed, step_s=64 / speed))
        for speed in speeds
    ]
    rival = replace(swept[1], measured=replace(swept[1].measured, tokens_per_s=95.0, step_s=0.7))
    report = results_report([*runs, rival], [], "r", "made")
    assert "100 tokens/s" in report.answer and "measured 5 times" in report.answer
    speed = next(section.blocks[0] for section in report.sections if section.title == "Speed")
    assert "100 at 32" in speed.alt and "300" not in speed.alt


def test_a_thousand_results_stay_a_small_page(swept):
    assert len(to_html(results_report(swept * 111, [], "r", "made"))) < 3_000_000


def test_nothing_beats_what_the_pareto_front_holds():
    offers = [
        Offer(name=str(i), seconds=s, low=c, high=c)
        for i, (s, c) in enumerate([(1, 9), (2, 5), (3, 6), (4, 1)])
    ]
    assert [o.name for o in pareto(offers)] == ["0", "1", "3"]


# ------------------------------------------------------------- the command


@pytest.fixture
def results(tmp_path: Path, swept, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "results.jsonl"
    for measurement in swept[:3]:
        append_result(path, measurement)
    return path


def test_the_command_writes_both_files_and_says_the_answer(results, capsys, sketched):
    with results.open("a") as file:
        file.write('{"schema_version": 9}\n{"torn')
    assert run(["report", "results.jsonl", "--html", "out/a.html", "--md", "a.md"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    html, markdown = Path("out/a.html").read_text(), Path("a.md").read_text()
    assert "schema_version 9" in html and "cut off" in html and markdown.startswith("# ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["results.jsonl"], 2, "where to"),
        (["results.jsonl", "--html", "."], 1, "can't write"),
        (["results.jsonl", "--html", "results.jsonl/x.html"], 1, "can't write"),
        (["empty.jsonl", "--html", "x.html"], 1, "holds no result"),
        (["folder", "--html", "x.html"], 1, "no .jsonl file"),
        (["missing.jsonl", "--html", "x.html"], 2, "does not exist"),
        (["results.jsonl", "--html", "./results.jsonl"], 2, "overwritten"),
        (["results.jsonl", "--html", "x.html", "--md", "x.html"], 2, "overwritten"),
        (["foreign.jsonl", "--html", "x.html"], 1, "schema_version 9"),
    ],
)
def test_what_can_t_be_reported_is_one_line(results, capsys, words, code, message, sketched):
    Path("empty.jsonl").touch()
    Path("foreign.jsonl").write_text('{"schema_version": 9}\n')
    Path("folder").mkdir()
    before = sorted(path.name for path in Path().iterdir())
    assert run(["report", *words]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == before


def test_a_file_too_large_for_a_small_machine_is_refused(results, monkeypatch, capsys):
    monkeypatch.setattr("bench.store.MAX_FILE_BYTES", 1000)
    assert run(["report", "results.jsonl", "--html", "x.html"]) == 1
    assert "split it" in capsys.readouterr().err


def test_a_plan_is_reported_before_anything_runs(tmp_path, monkeypatch, capsys, sketched):
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path / "plan.yaml", SETUP.with_(max_steps=100), "a100-80gb-sxm4", {})
    assert run(["report", "plan.yaml", "--html", "p.html"], Session()) == 0
    html = Path("p.html").read_text()
    assert "Fits, " in capsys.readouterr().out
    for words in (
        "What fits, by length",
        "Here or in the cloud",
        "Time against cost",
        "finefit train plan.yaml",
    ):
        assert words in html


def write_run(folder: Path, summary: object = None) -> None:
    folder.mkdir()
    write_plan(folder / "plan.yaml", SETUP, "rtx-4090", {})
    lines = [{"kind": "step", "step": i, "loss": 3 - 0.1 * i, "rss_bytes": GIB} for i in range(1, 5)]
    lines += [{"kind": "eval", "step": i, "loss": 3 - 0.2 * i, "token_accuracy": 0.1 * i} for i in (0, 4)]
    lines += [
        {"kind": "sample", "step": i, "samples": [{"prompt": "asked", "answer": f"answer {i}"}]}
        for i in range(8)
    ]
    lines += [
        {"kind": "retry", "step": 2, "note": "out of memory: smaller steps"},
        {"kind": "warning", "step": 3},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"kind": "step", "step": NaN}\n[[[[\n{"kind'
    (folder / "metrics.jsonl").write_text(text)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))


def test_a_run_is_reported_finished_or_not(tmp_path, monkeypatch, capsys, sketched):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "going")
    assert run(["report", "going", "--md", "a.md"]) == 0
    text = Path("a.md").read_text().replace("\\", "")
    assert "Not judged" in capsys.readouterr().out and "isn't finished" in text
    shown = [i for i in range(8) if f"answer {i}" in text]
    assert len(shown) == 6 and shown[0] == 0 and shown[-1] == 7 and "smaller steps" in text
    answer = {"prompt": HOSTILE, "answer": HOSTILE, "expected": None}
    summary = {
        "eval_before": {"loss": 3.0},
        "eval_after": {"loss": 2.0},
        "train_s": 10.0,
        "device": HOSTILE,
        "measured": {"tokens_per_s": 100.0, "step_s": 0.5},
        "sample_before": [answer],
        "sample_after": [answer, 5],
        "versions": {"torch": "2.13.0+cpu"},
        "notes": [HOSTILE],
    }
    write_run(tmp_path / "done", summary)
    assert run(["report", "done", "--html", "b.html"]) == 0
    assert "from 3.000 to 2.000" in capsys.readouterr().out
    assert (
        Page(Path("b.html").read_text()).tags["script"] == 0
        and "torch==2.13.0<" in Path("b.html").read_text()
    )
    write_run(tmp_path / "broken", [1, 2])
    assert run(["report", "broken", "--html", "c.html"]) == 1


# ------------------------------------------------------------- in a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("load", () => {
  const page = document.documentElement, right = e => e.getBoundingClientRect().right;
  const parts = [...document.querySelectorAll("main > section > *, figure, h1, .answer")];
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    overflow: Math.max(page.scrollWidth - innerWidth, parts.filter(e => right(e) > innerWidth + 1).length),
    small: [...document.querySelectorAll("svg text")].filter(e => e.getBoundingClientRect().height < 6).length,
  }), "*");
})</script></body>"""
FRAME = """<body style="margin:0"><script>onmessage = e => {{ document.body.dataset.seen = e.data }}</script>
<iframe src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe></body>"""
HEIGHT = 4000


def browse(folder: Path, page: Path, width: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Chromium with the page in a frame of that width; its own window is never narrower than 500 pixels."""
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width, height=HEIGHT))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    flags += ["--disable-background-networking", f"--user-data-dir={folder / 'profile'}"]
    flags += [f"--window-size={max(width, 500)},{HEIGHT}", "--enable-logging=stderr"]
    command = [str(CHROMIUM), *flags, *words, frame.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def artefacts(tmp_path: Path) -> Path:
    """Where screenshots stay: the folder that FINEFIT_TEST_ARTEFACTS names, else the test's own."""
    folder = Path(os.environ.get("FINEFIT_TEST_ARTEFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_a_browser_shows_it_without_errors_or_overflow(width, tmp_path, drawn):
    _, html = drawn
    page, probe = tmp_path / "page.html", tmp_path / "probe.html"
    page.write_text(html)
    probe.write_text(re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", PROBE))
    screenshot = artefacts(tmp_path) / f"report-{width}.png"
    shown = browse(tmp_path, page, width, f"--screenshot={screenshot}")
    assert screenshot.stat().st_size > 10_000 and "CONSOLE" not in shown.stderr
    seen = unescape(browse(tmp_path, probe, width, "--virtual-time-budget=5000", "--dump-dom").stdout)
    assert f'{{"width":{width},"overflow":0,"small":0}}' in seen


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_what_is_printed_holds_the_plan_that_the_screen_folds_away(tmp_path, drawn):
    page, pdf = tmp_path / "page.html", tmp_path / "page.pdf"
    text = drawn[1]
    page.write_text(
        re.sub(r"<section>.*</section>(?=\s*<section>\s*<h2>Reproduce)", "", text, flags=re.DOTALL)
    )
    browse_flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    sizes = []
    for html in (page.read_text(), page.read_text().replace("::details-content", "::nothing")):
        page.write_text(html)
        command = [str(CHROMIUM), *browse_flags, f"--print-to-pdf={pdf}", page.as_uri()]
        subprocess.run(command, capture_output=True, timeout=120, check=True)
        sizes.append(len(re.findall(rb"/Type */Page\b", pdf.read_bytes())))
    assert sizes[0] > sizes[1]
