"""Conversations as text, and where in it the answers are.

The tokenizer's own chat template writes the text. Three ways find what the assistant says, tried in this order:

* "marker": the template marks it itself with {% generation %};
* "prefix": what the template adds when the answer follows its generation prompt, which is exactly what the model
  will have to write; holds where rendering fewer turns gives a beginning of the whole text;
* "search": the turns are found between the template's own words, which a rendering with placeholders shows;
  for templates that rewrite earlier turns (thoughts that are cut, an end mark only after the last turn).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planner.dataset import Message

Span = tuple[int, int]
"""Beginning and end in characters."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""The template for tokenizers without one: a heading per turn, and the end token after each answer."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "TURNPLACEHOLDER"
_THOUGHTS_END = "</think>"
_LOST = "the answers can't be found in what the chat template writes"


class TemplateError(Exception):
    """A conversation that the template can't write, or in which the answers can't be found."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it; `answers` are the spans that the assistant writes, in order.

    An answer's end token may lie inside its span or just behind it. `cuts_thoughts`: the template left out what
    an answer holds before </think>, as many do in earlier turns.
    """

    text: str
    answers: tuple[Span, ...]
    method: str
    cuts_thoughts: bool


def ensure_template(tokenizer: Any) -> str:
    """ "chat" where the tokenizer brings a template; else set the plain one (saved with it) and say "plain".

    The plain template begins with the BOS token where the tokenizer would add one to a plain text.
    """
    if tokenizer.chat_template:
        return "plain" if tokenizer.chat_template.endswith(PLAIN_TEMPLATE) else "chat"
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
    return "plain"


def render(tokenizer: Any, messages: Sequence[Message]) -> Rendered:
    """The conversation's text and its answers' spans. Raises TemplateError in one line."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    failures = []
    for method, find in _METHODS.items():
        try:
            found = find(tokenizer, turns)
        except TemplateError as error:
            failures.append(str(error))
            continue
        if found is not None:
            return Rendered(found[0], tuple(found[1]), method, _cuts_thoughts(found[0], turns))
    raise TemplateError(failures[-1])


def render_text(
    tokenizer: Any, turns: Sequence[dict[str, str]], *, add_generation_prompt: bool = False, **words: Any
) -> str:
    """The template's text for {"role", "content"} turns; `words` are what else it may ask for, such as
    enable_thinking. Raises TemplateError with the template's own complaint.
    """
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=add_generation_prompt, **words
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TemplateError(f"the chat template refuses this conversation ({reason})") from error
    return text


def _answers(turns: Sequence[dict[str, str]]) -> list[str]:
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def _without_thoughts(content: str) -> str:
    return content.rpartition(_THOUGHTS_END)[2].strip()


def _cuts_thoughts(text: str, turns: Sequence[dict[str, str]]) -> bool:
    """Whether the text misses what an answer holds before its end of thoughts."""
    thoughts = [
        content.rpartition(_THOUGHTS_END)[0].rpartition("<think>")[2].strip() for content in _answers(turns)
    ]
    return not all(thought in text for thought in thoughts)


_Found = tuple[str, list[Span]]


def _find_by_marker(tokenizer: Any, turns: Sequence[dict[str, str]]) -> _Found | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.chat_template
    if not _MARKER.search(template):
        return None
    text = render_text(tokenizer, turns)
    rendered, spans = render_jinja_template(
        conversations=[list(turns)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    answered = "".join(text[start:end] for start, end in spans[0])
    if rendered[0] != text or not _holds_in_order(answered, [_without_thoughts(c) for c in _answers(turns)]):
        raise TemplateError(_LOST)
    return text, [(start, end) for start, end in spans[0]]


def _holds_in_order(text: str, parts: Sequence[str]) -> bool:
    at = 0
    for part in parts:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def _find_by_prefix(tokenizer: Any, turns: Sequence[dict[str, str]]) -> _Found | None:
    text = render_text(tokenizer, turns)
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = render_text(tokenizer, turns[:number])
        prompt = render_text(tokenizer, turns[:number], add_generation_prompt=True)
        through = render_text(tokenizer, turns[: number + 1]) if number + 1 < len(turns) else text
        if not (text.startswith(through) and through.startswith(prompt)):
            return None
        placed = render_text(tokenizer, [*turns[:number], {**turn, "content": _PLACEHOLDER}])
        spans.append(_answer_in(through, prompt, placed, has_prompt=prompt != before))
    return text, spans


def _answer_in(through: str, prompt: str, placed: str, *, has_prompt: bool) -> Span:
    """The answer in what follows the prompt; `placed` is the same text with the placeholder as content.

    It ends with the content, or at the very end where the template rewrote that. It begins with the content
    where the template has no generation prompt, so that the turn's heading is no answer.
    """
    head, found, tail = placed.partition(_PLACEHOLDER)
    if not found:
        raise TemplateError(_LOST)
    if not (through.startswith(head) and through.endswith(tail) and len(head) + len(tail) < len(through)):
        return len(prompt), len(through)
    return len(prompt) if has_prompt else len(head), len(through) - len(tail)


def _find_by_search(tokenizer: Any, turns: Sequence[dict[str, str]]) -> _Found | None:
    text = render_text(tokenizer, turns)
    glue = _glue(tokenizer, turns)
    if not text.startswith(glue[0]):
        raise TemplateError(_LOST)
    at, spans = len(glue[0]), []
    for turn, following in zip(turns, glue[1:], strict=True):
        content = _written_form(text, at, turn["content"], following)
        if turn["role"] == "assistant":
            spans.append((at, at + len(content)))
        at += len(content) + len(following)
    if at != len(text):
        raise TemplateError(_LOST)
    return text, spans


_FORMS: tuple[Callable[[str], str], ...] = (
    lambda content: content,
    str.strip,
    lambda content: content.rpartition(_THOUGHTS_END)[2],
    _without_thoughts,
)
"""How templates write a turn's content: as it is, without blanks around it, without the thoughts."""


def _glue(tokenizer: Any, turns: Sequence[dict[str, str]]) -> list[str]:
    """The template's own words: before the first turn's content, between contents, after the last."""
    names = [f"{_PLACEHOLDER}{number}END" for number in range(len(turns))]
    marked = [{**turn, "content": name} for turn, name in zip(turns, names, strict=True)]
    rest, glue = render_text(tokenizer, marked), []
    for name in names:
        before, found, rest = rest.partition(name)
        if not found:
            raise TemplateError(_LOST)
        glue.append(before)
    return [*glue, rest]


def _written_form(text: str, at: int, content: str, following: str) -> str:
    for form in _FORMS:
        if text.startswith(form(content) + following, at):
            return form(content)
    raise TemplateError(_LOST)


_METHODS: dict[str, Callable[[Any, Sequence[dict[str, str]]], _Found | None]] = {
    "marker": _find_by_marker,
    "prefix": _find_by_prefix,
    "search": _find_by_search,
}
