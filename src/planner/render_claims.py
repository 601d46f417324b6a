"""Judged claims as text: a table, or a report in Markdown, in English or Chinese."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from planner.claims import Case, Finding, Judged, Judgement
from planner.cost import Span
from planner.methods import find_method
from planner.money import Money
from planner.render import Column, format_table
from planner.setup import TrainSetup
from planner.units import format_bytes

ENGLISH: Mapping[str, str] = {
    "title": "What the guides claim",
    "made": "Made by `finefit claims --markdown`; prices as of {day}. "
    "Memory is the predicted use of the device of what torch can have of it.",
    "true": "true",
    "true-only-if": "true only if",
    "false": "false",
    "not-a-hardware-claim": "not a hardware claim",
    "not-answered": "not answered",
    "claim": "claim",
    "verdict": "verdict",
    "quote": "quote",
    "guide": "guide",
    "configuration": "configuration",
    "figures": "finefit's figures",
    "holds": "holds",
    "yes": "yes",
    "no": "no",
    "between": "tight",
    "unknown": "unknown",
    "of": "{used} of {usable}",
    "share": "{share:.2%}",
    "ratio": "{ratio:.2f} times as fast",
    "hours": "{low:,.1f} to {high:,.1f} hours",
    "nearest": "Nearest configuration that fits: ",
    "counts": "{count} claims",
}
CHINESE: Mapping[str, str] = {
    "title": "四篇指南的说法",
    "made": "由 `finefit claims --markdown --lang zh` 生成;价格截至 {day}。显存为预测的设备占用与torch可用量之比。",
    "true": "属实",
    "true-only-if": "仅在下列条件下属实",
    "false": "不属实",
    "not-a-hardware-claim": "不是硬件断言",
    "not-answered": "无法回答",
    "claim": "编号",
    "verdict": "结论",
    "quote": "原文",
    "guide": "出处",
    "configuration": "配置",
    "figures": "finefit的数字",
    "holds": "成立",
    "yes": "是",
    "no": "否",
    "between": "勉强",
    "unknown": "未知",
    "of": "{used} / {usable}",
    "share": "{share:.2%}",
    "ratio": "速度为{ratio:.2f}倍",
    "hours": "{low:,.1f} 至 {high:,.1f} 小时",
    "nearest": "最接近且放得下的配置:",
    "counts": "共{count}条",
}
LANGUAGES = {"en": ENGLISH, "zh": CHINESE}


def format_claims(judgement: Judgement, language: str, width: int | None = None) -> str:
    """A table of all claims with their verdicts; one claim alone with all its figures."""
    if len(judgement.judged) == 1:
        return "\n".join(_section(judgement.judged[0], LANGUAGES[language], {}))
    words = LANGUAGES[language]
    rows = [(j.claim.id, words[j.verdict], j.claim.quote) for j in judgement.judged]
    headers = (words["claim"], words["verdict"], words["quote"])
    columns = [
        Column(title=header, cells=tuple(row[i] for row in rows), is_prose=i == 2)
        for i, header in enumerate(headers)
    ]
    return format_table(columns, width)


def format_claims_markdown(judgement: Judgement, language: str) -> str:
    """A whole report: the verdicts, then each claim with the figures that they follow from."""
    words = LANGUAGES[language]
    titles = {guide.id: guide.title for guide in judgement.guides}
    lines = [f"# {words['title']}", "", words["made"].format(day=judgement.prices_as_of.isoformat()), ""]
    lines += _counts(judgement, words)
    for judged in judgement.judged:
        lines += ["", *_section(judged, words, titles)]
    return "\n".join(lines)


def _counts(judgement: Judgement, words: Mapping[str, str]) -> Iterator[str]:
    yield words["counts"].format(count=len(judgement.judged)) + ":"
    yield ""
    for verdict in dict.fromkeys(judged.verdict for judged in judgement.judged):
        ids = [j.claim.id for j in judgement.judged if j.verdict == verdict]
        yield f"* {words[verdict]}: {len(ids)} ({', '.join(ids)})"


def _section(judged: Judged, words: Mapping[str, str], titles: Mapping[str, str]) -> Iterator[str]:
    claim = judged.claim
    yield f"## {claim.id}: {words[judged.verdict]}"
    yield ""
    yield f"> {claim.quote}"
    if claim.guide in titles:
        yield ">"
        yield f"> {words['guide']}: {titles[claim.guide]}"
    note = claim.note if words is ENGLISH else claim.note_zh
    if note:
        yield ""
        yield note
    if judged.findings:
        yield ""
        yield f"| {words['configuration']} | {words['figures']} | {words['holds']} |"
        yield "|---|---|---|"
        for finding in judged.findings:
            yield f"| {_name(finding)} | {_figures(finding, words)} | {_answer(finding, words)} |"
    if judged.nearest is not None:
        found = judged.nearest.estimate
        usable = format_bytes(found.fit.usable_bytes or 0)
        figures = words["of"].format(used=format_bytes(found.memory.device_used_bytes), usable=usable)
        yield ""
        yield f"{words['nearest']}{setup_name(found.setup, found.gpu)}, {figures}"


def _name(finding: Finding) -> str:
    if finding.estimate is None:
        return _case_name(finding.case)
    return setup_name(finding.estimate.setup, finding.estimate.gpu)


def _case_name(case: Case) -> str:
    given = [str(value) for name, value in case.fields.items() if name in ("model", "method")]
    return ", ".join([*given, case.gpu])


def setup_name(setup: TrainSetup, gpu: str) -> str:
    """A setup in the field's short words, equal in every language.

    >>> setup_name(TrainSetup(model="llama-2-7b", rank=8, seq_len=512), "RTX 4080")
    'llama-2-7b, lora r8 all-linear, bfloat16, adamw, 1 x 512, RTX 4080'
    """
    targets = setup.targets if isinstance(setup.targets, str) else "+".join(setup.targets)
    adapters = f" r{setup.rank} {targets}" if find_method(setup.method).has_rank else ""
    dtype = setup.quant or setup.weights_dtype
    parts = [
        setup.model_label,
        f"{setup.method}{adapters}",
        dtype if setup.autocast is None else f"{dtype}/{setup.autocast} autocast",
        setup.optimizer,
        f"{setup.micro_batch_size} x {setup.seq_len}",
    ]
    parts += [f"x {setup.grad_accum_steps} accumulated"] if setup.grad_accum_steps > 1 else []
    parts += ["no checkpointing"] if setup.checkpointing == "none" else []
    parts += [setup.sharding] if setup.num_gpus > 1 else []
    parts += [f"offload {setup.offload}"] if setup.offload != "none" else []
    return ", ".join([*parts, gpu])


def _figures(finding: Finding, words: Mapping[str, str]) -> str:
    return "; ".join(_figure_parts(finding, words)) or words["unknown"]


def _figure_parts(finding: Finding, words: Mapping[str, str]) -> Iterator[str]:
    if finding.error is not None:
        yield finding.error
    if finding.share is not None:
        yield words["share"].format(share=finding.share)
    if finding.ratio is not None:
        yield words["ratio"].format(ratio=finding.ratio)
    if finding.hours is not None:
        yield _hours(finding.hours, words)
    if finding.money is not None:
        yield f"{_money(finding.money)} ({finding.money_source})"
    found = finding.estimate
    if found is not None and found.fit.usable_bytes is not None:
        used, usable = format_bytes(found.memory.device_used_bytes), format_bytes(found.fit.usable_bytes)
        yield words["of"].format(used=used, usable=usable)


def _hours(hours: Span, words: Mapping[str, str]) -> str:
    return words["hours"].format(low=hours.low, high=hours.high)


def _money(money: Money) -> str:
    if money.low == money.high:
        return f"{money.low:,.0f} {money.currency}"
    return f"{money.low:,.0f} to {money.high:,.0f} {money.currency}"


def _answer(finding: Finding, words: Mapping[str, str]) -> str:
    if finding.holds is None:
        is_tight = finding.estimate is not None and finding.estimate.fit.verdict == "tight"
        return words["between" if is_tight else "unknown"]
    return words["yes" if finding.holds else "no"]
