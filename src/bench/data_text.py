"""A data set's inspection, and rows with their trained tokens marked, as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from bench.data_audit import Finding
from bench.data_edit import Edited
from bench.data_report import Found, Inspection, Lengths
from bench.encode import Document
from planner.dataset import Row
from planner.render import format_bar, format_facts, paint, printable, wants_color, wrap

MAX_SHOWN_TOKENS = 400
"""Of a row whose tokens are shown."""
MAX_SHOWN_LANGUAGES = 6
_FAULTS = {
    "json": "broken JSON",
    "encoding": "not UTF-8",
    "empty": "empty",
    "same": "chosen and rejected are one",
    "format": "wrong columns or turns",
}
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What would steer a terminal, or turn the order of what is read."""


def format_inspection(found: Inspection, width: int | None = None) -> str:
    """The facts, the lengths as a histogram, and below what would stop a training run."""
    parts = [format_facts(_facts(found), width)]
    lengths = found.tokens.lengths if found.tokens else found.characters
    if lengths is not None:
        parts.append(_format_lengths(lengths, width))
    parts += [wrap(f"note: {printable(note)}", width, rest="  ") for note in found.notes]
    parts.append(format_findings(found.findings, width))
    return "\n\n".join(part for part in parts if part)


def format_findings(findings: Sequence[Finding], width: int | None = None) -> str:
    """One paragraph each; empty without any."""
    lines = [f"{paint('stops a run', 'bad')}: {printable(str(f.as_error()))}" for f in findings]
    return "\n".join(wrap(line, width, rest="  ") for line in lines)


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "format", found.format + _ignored(found.ignored_columns)
    files = "" if found.num_files == 1 else f" in {found.num_files} files"
    yield "rows", f"{found.num_rows:,}{files}, {found.size_bytes:,} bytes"
    if found.num_pairs:
        yield "pairs", f"{found.num_pairs:,} rows with a chosen and a rejected answer, for --objective dpo"
    for name, fault in found.faults.items():
        yield "can't be read", f"{_FAULTS[name]}: {_found(fault)}"
    if found.fault_message:
        yield "", printable(found.fault_message)
    yield from _token_facts(found)
    yield "duplicates", _found(found.exact_duplicates)
    yield "near-duplicates", _found(found.near_duplicates)
    if found.overlap is not None:
        of = f" of {found.overlap.num_rows:,}"
        yield "evaluation rows", f"in the training file: {_found(found.overlap.exact, of)}"
        yield "", f"nearly: {_found(found.overlap.near, of)}"
    yield "languages", _languages(found)
    for name, one in found.personal.items():
        yield "personal strings", f"{one.count:,} {name} in {_found(one)}"
    for name, one in found.encoding.items():
        yield "encoding", f"{name}: {_found(one)}"


def _ignored(columns: Sequence[str]) -> str:
    names = ", ".join(printable(name)[:40] for name in columns[:8])
    return f" (columns that are not used: {names})" if names else ""


def _token_facts(found: Inspection) -> Iterator[tuple[str, str]]:
    tokens = found.tokens
    if tokens is None:
        return
    measured = f" of {tokens.lengths.num_rows:,}"
    yield (
        "cut at seq_len",
        f"{tokens.num_truncated_rows:,}{measured} rows are longer than {tokens.seq_len} tokens",
    )
    if tokens.num_truncated_pairs:
        yield "", f"{tokens.num_truncated_pairs:,} of them with both answers"
    share = tokens.num_lost_answer_tokens / max(1, tokens.num_answer_tokens)
    yield (
        "answer tokens",
        f"{tokens.num_answer_tokens:,}, of which {tokens.num_lost_answer_tokens:,} lost ({share:.1%})",
    )
    yield "nothing to train", f"{tokens.num_untrained_rows:,}{measured} rows"
    if tokens.num_refused_rows:
        yield "refused", f"{tokens.num_refused_rows:,} rows by the chat template"
    if tokens.num_control_token_rows:
        yield "control tokens", f"{tokens.num_control_token_rows:,}{measured} rows hold the text of one"
    if tokens.num_cut_thought_rows:
        yield "thoughts", f"the template leaves some out in {tokens.num_cut_thought_rows:,}{measured} rows"


def _found(found: Found, of: str = "") -> str:
    if not found.num_rows:
        return f"0{of} rows"
    first = "; ".join(printable(place) for place in found.first[:2])
    more = ", …" if found.num_rows > 2 else ""
    return f"{found.num_rows:,}{of} row{'s' if found.num_rows > 1 else ''} ({first}{more})"


def _languages(found: Inspection) -> str:
    total = max(1, found.num_language_rows)
    main = list(found.languages.items())[:MAX_SHOWN_LANGUAGES]
    shown = [f"{name} {count / total:.1%}" for name, count in main if count >= 0.005 * total]
    rest = 1 - sum(count for name, count in main if count >= 0.005 * total) / total
    return ", ".join(shown) + (f", others {rest:.1%}" if rest > 0.0005 and shown else "") or "unknown"


def _format_lengths(lengths: Lengths, width: int | None) -> str:
    heading = (
        f"{lengths.unit} per row: p50 {lengths.p50:,}, p90 {lengths.p90:,}, p99 {lengths.p99:,}, "
        f"longest {lengths.longest:,}; {lengths.total:,} in {lengths.num_rows:,} rows"
    )
    top = max(count for _, _, count in lengths.histogram)
    labels = [
        f"{low:,} to {below - 1:,}" if below > low + 1 else f"{low:,}" for low, below, _ in lengths.histogram
    ]
    wide = max(map(len, labels))
    bars = [
        f"  {label:>{wide}}  {count:>9,}  {format_bar(count / top)}".rstrip()
        for label, (_, _, count) in zip(labels, lengths.histogram, strict=True)
    ]
    return "\n".join([wrap(paint(heading, "strong"), width), *bars])


def format_edited(done: Edited, width: int | None = None) -> str:
    """What was written, what was left out and why."""
    facts = [(name, f"{count:,} rows") for name, count in done.written.items()]
    facts += [("left out", f"{count:,} {name}") for name, count in done.left_out.items()]
    facts += [("redacted", f"{count:,} {name}") for name, count in done.redacted.items()]
    return format_facts([(printable(name), value) for name, value in facts], width)


def format_mask(row: Row, document: Document, tokenizer: Any, seq_len: int) -> str:
    """The row as the model sees it: trained tokens green (without colours between ⟦ and ⟧), the others dim.

    A bar shows where seq_len cuts; what lies beyond trains nothing.
    """
    num_trained = int(document.trained[1:seq_len].sum())
    heading = f"{printable(row.path)}:{row.line}  {num_trained:,} of {len(document.ids):,} tokens train"
    ids = document.ids[:MAX_SHOWN_TOKENS].tolist()
    marks = [
        "cut" if place >= seq_len else "trained" if place and document.trained[place] else "seen"
        for place in range(len(ids))
    ]
    text = ""
    for mark, group in groupby(zip(marks, ids, strict=True), key=lambda pair: pair[0]):
        words = _CONTROL.sub(
            "�", tokenizer.decode([number for _, number in group], skip_special_tokens=False)
        )
        text += _paint_lines(words, mark)
    more = len(document.ids) - len(ids)
    return f"{paint(heading, 'strong')}\n{text}" + (f"\n… {more:,} more tokens" if more > 0 else "")


_MARKS: Mapping[str, tuple[str, str, str]] = {
    "trained": ("good", "⟦", "⟧"),
    "seen": ("dim", "", ""),
    "cut": ("bad", "│", ""),
}


def _paint_lines(text: str, mark: str) -> str:
    tone, opening, closing = _MARKS[mark]
    if not wants_color():
        return f"{opening}{text}{closing}"
    prefix = opening if mark == "cut" else ""
    return prefix + "\n".join(paint(line, tone) for line in text.split("\n"))
