"""The guides' claims: each is judged from finefit's own numbers, and the committed reports are what the code says."""

import json
from pathlib import Path

import pytest

from bench.cli import run
from planner.claim_rules import RULES, judge_claims
from planner.claims import FALSE, NOT_ANSWERED, NOT_HARDWARE, TRUE, TRUE_ONLY_IF, read_claims, read_guides
from planner.render_claims import CHINESE, ENGLISH, format_claims_markdown

REPORTS = Path(__file__).parents[1] / "reports"


@pytest.fixture(scope="module")
def judgement():
    return judge_claims()


def judged(judgement, name):
    return next(j for j in judgement.judged if j.claim.id == name)


def test_every_claim_can_be_judged():
    claims = read_claims()
    guides = {guide.id for guide in read_guides()}
    assert len({claim.id for claim in claims}) == len(claims) == 41
    for claim in claims:
        assert claim.guide in guides
        assert bool(claim.cases) == (claim.rule not in ("not-hardware", "not-answered"))
        assert claim.rule in RULES
        assert bool(claim.note) == bool(claim.note_zh)


def test_both_languages_have_the_same_words():
    assert ENGLISH.keys() == CHINESE.keys()


@pytest.mark.parametrize(("language", "name"), [("en", "claims.md"), ("zh", "claims.zh-CN.md")])
def test_the_committed_report_is_what_the_code_says(judgement, language, name):
    assert (REPORTS / name).read_text(encoding="utf-8") == format_claims_markdown(judgement, language) + "\n"


def test_a_verdict_follows_from_its_findings(judgement):
    for one in judgement.judged:
        answers = {finding.holds for finding in one.findings}
        if one.verdict == TRUE:
            assert answers == {True}
        if one.verdict == FALSE:
            assert answers == {False}
        if one.verdict == TRUE_ONLY_IF:
            assert len(answers) > 1 or answers == {None}
        if one.verdict == NOT_HARDWARE:
            assert not answers
        if one.verdict == NOT_ANSWERED:
            assert answers <= {None}


def test_the_sample_that_names_modules_the_model_lacks_is_told_which_it_has(judgement):
    sample = judged(judgement, "M19")
    assert sample.verdict == FALSE
    assert "c_attn" in sample.findings[0].error
    assert sample.nearest.changes["targets"] == "all-linear"
    assert sample.nearest.estimate.fit.verdict == "fits"


def test_what_is_refused_everywhere_comes_with_a_configuration_that_fits(judgement):
    for name in ("M6", "M18"):
        near = judged(judgement, name).nearest
        assert near.estimate.fit.verdict == "fits"
        assert near.changes


def test_named_claims_show_their_figures(capsys):
    assert run(["claims", "m6", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [claim["id"] for claim in content["claims"]] == ["M6"]
    assert all(finding["peak_allocated_bytes"] > 0 for finding in content["claims"][0]["findings"])
    assert run(["claims", "M66"]) == 2
    assert "unknown claim 'M66'" in capsys.readouterr().err
