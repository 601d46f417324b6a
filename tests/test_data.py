from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.batching import collate
from bench.chat_template import PLAIN_TEMPLATE, ensure_template, render_text
from bench.data import (
    IGNORE_INDEX,
    Example,
    Tokenized,
    check_vocabulary,
    load_rows,
    split,
    token_lengths,
    tokenize_rows,
)
from bench.data_audit import find_lost_labels, find_unlike_serving
from bench.token_cache import tokenize_file
from planner.dataset import Message, Row
from planner.errors import DataError, SetupError

pytestmark = pytest.mark.train

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "no generation prompt": CHATML.partition("{% if add")[0],
    "marker": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "bos in the template, contents trimmed": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    "inst": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>"
        "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
    ),
    "last turn closed twice": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "thoughts cut from earlier turns": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and not loop.last and '</think>' in m['content'] %}"
        "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "ends with the next turn": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "two end tokens": CHATML.replace("'<|im_end|>'", "'<|end|><|im_end|>'"),
    "plain": PLAIN_TEMPLATE,
}
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]

Maker = Callable[..., Any]


@pytest.fixture(scope="module")
def make_tokenizer() -> Maker:
    """A byte-level tokenizer with control tokens, as small as can be, with the template that is asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    def make(
        template: str | None = CHATML,
        *,
        adds_bos: bool = False,
        eos: str | None = "<|im_end|>",
        special: Sequence[str] = SPECIAL,
    ) -> Any:
        vocab = {word: number for number, word in enumerate([*special, *alphabet, "Ġt", "he", "Ġthe"])}
        raw = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        if adds_bos:
            raw.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, bos_token="<s>", eos_token=eos, pad_token=eos
        )
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.chat_template = template
        return tokenizer

    return make


def conversation(*contents: str, line: int = 1) -> Row:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[n % 2], content=text) for n, text in enumerate(contents))
    return Row(messages=messages, line=line, path="d.jsonl")


def trained_texts(tokenizer: Any, example: Example) -> list[str]:
    """The trained stretches of an example, as text."""
    texts, ids = [], []
    for number, label in zip(example.input_ids.tolist(), [*example.labels.tolist()], strict=True):
        if label == IGNORE_INDEX:
            texts += [tokenizer.decode(ids)] if ids else []
            ids = []
        else:
            assert label == number
            ids.append(label)
    return texts + ([tokenizer.decode(ids)] if ids else [])


TALK = ("Hi the", "Hello!", "And the rest?", "the\nend 12")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(
    "contents", [TALK[:2], TALK, ("<|", "|>", "assistant", "im_end")], ids=["one", "two", "tricky"]
)
def test_every_answer_and_its_end_train_and_nothing_else(
    make_tokenizer: Maker, template: str, contents: Sequence[str]
) -> None:
    tokenizer = make_tokenizer(template)
    [example] = tokenize_rows([conversation(*contents)], tokenizer, seq_len=4096).examples
    stretches = [text.lstrip(" ") for text in trained_texts(tokenizer, example)]
    answers = contents[1::2]
    for number, (stretch, answer) in enumerate(zip(stretches, answers, strict=True)):
        ends_with_next_turn = "<|user|>" in template or "<|{{" in template
        is_last = number == len(answers) - 1
        end = "<|user|>" if ends_with_next_turn and not is_last else "<|im_end|>"
        assert stretch == answer + ("<|end|>" if "<|end|>" in template else "") + end


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("inst", "no generation prompt")])
def test_what_comes_before_an_answer_is_what_inference_would_send(make_tokenizer: Maker, name: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    [example] = tokenize_rows([conversation(*TALK[:2])], tokenizer, seq_len=4096).examples
    sent = render_text(tokenizer, [{"role": "user", "content": TALK[0]}], add_generation_prompt=True)
    first = int(np.flatnonzero(example.labels != IGNORE_INDEX)[0])
    assert example.input_ids[:first].tolist() == tokenizer(sent, add_special_tokens=False)["input_ids"]


def test_the_way_answers_were_found_is_stated(make_tokenizer: Maker) -> None:
    def methods(name: str, *contents: str) -> tuple[str, ...]:
        return tokenize_rows(
            [conversation(*contents)], make_tokenizer(TEMPLATES[name]), seq_len=4096
        ).facts.spans

    assert methods("marker", *TALK) == ("marker",)
    assert methods("chatml", *TALK) == ("prefix",)
    assert methods("last turn closed twice", *TALK) == ("search",)


def test_cut_thoughts_are_not_looked_for(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer(TEMPLATES["thoughts cut from earlier turns"])
    row = conversation("a", "<think>x</think>\n\nb", "c", "<think>y</think>d")
    [example] = tokenize_rows([row], tokenizer, seq_len=4096).examples
    assert trained_texts(tokenizer, example) == ["b<|im_end|>", "<think>y</think>d<|im_end|>"]


def test_cut_thoughts_are_counted(make_tokenizer: Maker) -> None:
    rows = [conversation("a", "<think>why</think>b", "c", "d"), conversation("a", "<think>why</think>b")]
    tokenizer = make_tokenizer(TEMPLATES["thoughts cut from earlier turns"])
    assert tokenize_rows(rows, tokenizer, seq_len=4096).facts.num_cut_thought_rows == 1


def test_a_marker_that_marks_something_else_is_not_believed(make_tokenizer: Maker) -> None:
    marked = "{% generation %}{% endgeneration %}"
    tokenizer = make_tokenizer(CHATML.replace("{% endfor %}", marked + "{% endfor %}"))
    result = tokenize_rows([conversation("Hi", "Hello!")], tokenizer, seq_len=4096)
    assert trained_texts(tokenizer, result.examples[0]) == ["Hello!<|im_end|>"]
    assert result.facts.spans == ("prefix",)


def test_a_block_that_the_template_adds_before_the_answer_is_learned(make_tokenizer: Maker) -> None:
    template = CHATML.replace(
        "+ m['content'] +", "+ ('<think></think>' if m['role'] == 'assistant' else '') + m['content'] +"
    )
    tokenizer = make_tokenizer(template)
    [example] = tokenize_rows([conversation("a", "think")], tokenizer, seq_len=4096).examples
    assert trained_texts(tokenizer, example) == ["<think></think>think<|im_end|>"]


def published_templates() -> list[Path]:
    trl = importlib.util.find_spec("trl")
    return sorted(Path(trl.origin).parent.glob("chat_templates/*.jinja")) if trl and trl.origin else []


@pytest.mark.skipif(not published_templates(), reason="needs trl, which carries templates of many models")
def test_templates_of_published_models(make_tokenizer: Maker) -> None:
    """Every answer trains whole with a token that ends it, and no user's word does; or an error says why not.

    The models' own control tokens are told by their look. A published training template may mark more.
    """
    refused = []
    for path in published_templates():
        template = path.read_text(encoding="utf-8")
        found = set(re.findall(r"<[|｜][^<>]{1,40}[|｜]>|<[a-z_]*end_of[a-z_]*>|<turn[|]>", template))
        tokenizer = make_tokenizer(template, special=[*SPECIAL, *sorted(found - set(SPECIAL))])
        row = conversation("First question", "Hello!", "Second question", "Bye 2")
        try:
            [example] = tokenize_rows([row], tokenizer, seq_len=100_000).examples
        except DataError as error:
            refused.append(f"{path.stem}: {error}")
            continue
        trained = "".join(trained_texts(tokenizer, example))
        assert re.search(r"Hello!\s*<.*Bye 2\s*<", trained, re.DOTALL), path.stem
        assert "question" not in trained, path.stem
    assert len(refused) <= len(published_templates()) // 10, refused


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=3),
    st.sampled_from(sorted(TEMPLATES)),
)
def test_any_words_train_whole(make_tokenizer: Maker, contents: list[str], name: str) -> None:
    """Not one character of an answer is lost, whatever it holds (blanks at its ends may be trimmed)."""
    contents = [text.replace("\r", " ") for text in contents]
    pairs = [text for content in contents for text in (content, content)]
    tokenizer = make_tokenizer(TEMPLATES[name])
    try:
        [example] = tokenize_rows([conversation(*pairs)], tokenizer, seq_len=100_000).examples
    except DataError as error:
        assert "can't be found" in str(error)
        return
    stretches = trained_texts(tokenizer, example)
    assert len(stretches) == len(contents)
    for stretch, content in zip(stretches, contents, strict=True):
        assert content.strip() in stretch


def test_the_end_token_keeps_its_label_though_it_is_the_pad_token(make_tokenizer: Maker) -> None:
    from bench.batching import collate

    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [conversation("Hi", "Hello!"), conversation("Hi", "A longer answer, so that the other is padded")]
    examples = tokenize_rows(rows, tokenizer, seq_len=4096).examples
    batch = collate([[e] for e in examples], pad_id=tokenizer.pad_token_id)
    for number, example in enumerate(examples):
        labels = batch["labels"][number, : example.num_tokens]
        assert (labels == tokenizer.eos_token_id).sum() == 1
        assert (batch["labels"][number, example.num_tokens :] == IGNORE_INDEX).all()
        assert batch["attention_mask"][number].sum() == example.num_tokens


def test_never_two_bos(make_tokenizer: Maker) -> None:
    for template in (TEMPLATES["bos in the template, contents trimmed"], None):
        tokenizer = make_tokenizer(template, adds_bos=True)
        [example] = tokenize_rows([conversation("Hi", "Hello!")], tokenizer, seq_len=4096).examples
        assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
        texts = [Row(text=text, line=1, path="d") for text in ("Once", "<s>Once")]
        for example in tokenize_rows(texts, tokenizer, seq_len=4096, objective="pretrain").examples:
            assert tokenizer.decode(example.input_ids) == "<s>Once<|im_end|>"


def test_a_tokenizer_without_a_template_gets_the_plain_one_and_keeps_it(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer(None)
    result = tokenize_rows([conversation("Hi", "Hello!")], tokenizer, seq_len=4096)
    assert result.facts.template == "plain"
    assert (
        tokenizer.decode(result.examples[0].input_ids)
        == "### User:\nHi\n\n### Assistant:\nHello!<|im_end|>\n\n"
    )
    assert trained_texts(tokenizer, result.examples[0]) == ["Hello!<|im_end|>"]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert ensure_template(again) == "plain"
    assert again.chat_template == tokenizer.chat_template


def test_truncation_is_counted(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer()
    rows = [conversation("Hi", "x" * 10, line=n) for n in range(200)]
    rows += [conversation("Hi", "x" * 1000, line=201), conversation("y" * 1000, "lost", line=202)]
    result = tokenize_rows(rows, tokenizer, seq_len=100)
    assert max(e.num_tokens for e in result.examples) == 100
    facts = result.facts
    assert (facts.num_rows, facts.num_examples) == (202, 201)
    assert (facts.num_truncated_rows, facts.num_dropped_rows) == (2, 1)
    whole = tokenize_rows(rows, tokenizer, seq_len=100_000).facts
    assert whole.num_trained_tokens - facts.num_trained_tokens == facts.num_lost_answer_tokens
    assert whole.num_lost_answer_tokens == whole.num_truncated_rows == whole.num_dropped_rows == 0


def test_too_many_rows_without_an_answer_are_an_error(make_tokenizer: Maker) -> None:
    rows = [conversation("y" * (500 if n < 3 else 1), "answer", line=n + 1) for n in range(200)]
    with pytest.raises(
        DataError, match=r"^d.jsonl:1: 3 of 200 rows have nothing to train within seq_len 100"
    ):
        tokenize_rows(rows, make_tokenizer(), seq_len=100)


def test_answers_that_never_end_are_an_error(make_tokenizer: Maker) -> None:
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(DataError, match="never learn to stop: the chat template never ends"):
        tokenize_rows([conversation("Hi", "Hello")], make_tokenizer(bare, eos=None), seq_len=100)
    with pytest.raises(DataError, match="every answer is longer than seq_len 30"):
        tokenize_rows([conversation("Hi", "x" * 100)], make_tokenizer(), seq_len=30)


def test_a_template_that_refuses_names_the_row(make_tokenizer: Maker) -> None:
    refusing = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('never no') }}{% endif %}" + CHATML
    rows = [conversation("yes", "a", line=1), conversation("no", "b", line=2)]
    with pytest.raises(
        DataError, match=r"^d.jsonl:2: the chat template refuses this conversation \(never no\)"
    ):
        tokenize_rows(rows, make_tokenizer(refusing), seq_len=100)


def test_a_template_that_hides_the_answer_is_an_error(make_tokenizer: Maker) -> None:
    hiding = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"^d.jsonl:1: "):
        tokenize_rows([conversation("Hi", "Hello")], make_tokenizer(hiding), seq_len=100)


def test_pretraining_trains_all_and_loses_nothing(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer()
    text = "Once upon a time there was the end. " * 20
    rows = [Row(text=text, line=1, path="d"), conversation("Hi", "Hello!")]
    result = tokenize_rows(rows, tokenizer, seq_len=64, objective="pretrain")
    pieces = result.examples[:-1]
    assert tokenizer.decode(np.concatenate([p.input_ids for p in pieces])) == text + "<|im_end|>"
    assert len({p.group for p in pieces}) == 1
    assert all(
        (e.labels[1:] == e.input_ids[1:]).all() and e.labels[0] == IGNORE_INDEX for e in result.examples
    )
    assert result.facts.num_split_rows == 1
    assert result.facts.spans == ("all",)


def test_texts_have_no_answers(make_tokenizer: Maker) -> None:
    with pytest.raises(DataError, match=r"^d:7: plain texts hold no answers"):
        tokenize_rows([Row(text="Once", line=7, path="d")], make_tokenizer(), seq_len=64)
    with pytest.raises(SetupError, match="objective: training data for mlm"):
        tokenize_rows([conversation("Hi", "Hello")], make_tokenizer(), seq_len=64, objective="mlm")


def pair(*turns: str, rejected: str, line: int = 1) -> Row:
    """A conversation with its chosen answers, and the same with another last answer."""
    chosen = conversation(*turns).messages or ()
    other = (*chosen[:-1], replace(chosen[-1], content=rejected))
    return Row(messages=chosen, rejected=other, line=line, path="d.jsonl")


def test_of_a_pair_only_the_two_answers_train(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer()
    row = pair("Hi", "Shared answer", "And?", "Better", rejected="Worse words")
    [example] = tokenize_rows([row], tokenizer, seq_len=4096, objective="dpo").examples
    words = [
        tokenizer.decode(sequence.labels[sequence.labels != IGNORE_INDEX]) for sequence in example.sequences
    ]
    assert words == ["Better<|im_end|>", "Worse words<|im_end|>"]
    texts = [tokenizer.decode(sequence.input_ids) for sequence in example.sequences]
    plain = tokenize_rows(list(row.sequences), tokenizer, seq_len=4096).examples
    assert texts == [tokenizer.decode(other.input_ids) for other in plain]
    assert example.num_tokens == sum(s.num_tokens for s in example.sequences) > example.width


def test_a_pair_that_the_cut_leaves_without_a_difference_is_dropped(make_tokenizer: Maker) -> None:
    rows = [pair("Hi", "Good " * 50 + str(n), rejected="Good " * 50, line=n) for n in range(1, 4)]
    whole = tokenize_rows(rows, make_tokenizer(), seq_len=4096, objective="dpo")
    assert (whole.facts.num_examples, whole.facts.num_dropped_rows) == (3, 0)
    short = len(whole.examples[0].input_ids) - 20
    with pytest.raises(DataError, match="3 of 3 rows have nothing to train"):
        tokenize_rows(rows, make_tokenizer(), seq_len=short, objective="dpo")


def test_rows_and_objective_must_agree_on_pairs(make_tokenizer: Maker) -> None:
    with pytest.raises(DataError, match="the rows have no rejected one"):
        tokenize_rows([conversation("Hi", "Hello")], make_tokenizer(), seq_len=64, objective="dpo")
    with pytest.raises(DataError, match="set objective to dpo"):
        tokenize_rows([pair("Hi", "Hello", rejected="No")], make_tokenizer(), seq_len=64)


def test_pairs_come_back_from_the_cache_and_lie_by_sides_in_a_batch(
    tmp_path: Path, make_tokenizer: Maker
) -> None:
    path = tmp_path / "d.jsonl"
    lines = [{"prompt": f"n {n}", "chosen": "yes", "rejected": "not at all"} for n in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, again = (
        tokenize_file(path, make_tokenizer(), seq_len=64, objective="dpo", cache_dir=tmp_path)
        for _ in range(2)
    )
    assert [[s.input_ids.tolist() for s in e.sequences] for e in first.examples] == [
        [s.input_ids.tolist() for s in e.sequences] for e in again.examples
    ]
    assert [e.group for e in first.examples] == [e.group for e in again.examples]
    batch = collate([[e] for e in again.examples], pad_id=0)
    words = make_tokenizer().batch_decode([ids[ids != IGNORE_INDEX] for ids in batch["labels"]])
    assert words == ["yes<|im_end|>"] * 3 + ["not at all<|im_end|>"] * 3
    assert find_lost_labels([[e] for e in again.examples], batch) is None


def test_control_tokens_in_the_words_are_counted(make_tokenizer: Maker) -> None:
    rows = [conversation("Hi", "Hello"), conversation("What is <|im_end|>?", "A token")]
    assert tokenize_rows(rows, make_tokenizer(), seq_len=4096).facts.num_control_token_rows == 1


def make_examples(words: Sequence[int]) -> list[Example]:
    ids = [np.array([word, word], dtype=np.int32) for word in words]
    return [Example(input_ids=i, labels=i, group=str(i[0])) for i in ids]


@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=60),
    st.floats(0.01, 0.9),
    st.integers(0, 2**32 - 1),
)
def test_the_split_is_a_partition_without_shared_groups(words: list[int], fraction: float, seed: int) -> None:
    examples = make_examples(words)
    if len(set(words)) < 2:
        with pytest.raises(DataError, match="can't be split"):
            split(examples, fraction, seed)
        return
    train, held_out = split(examples, fraction, seed)
    assert {id(e) for e in train} | {id(e) for e in held_out} == {id(e) for e in examples}
    assert len(train) + len(held_out) == len(examples)
    assert train
    assert held_out
    assert not {e.group for e in train} & {e.group for e in held_out}
    again = split(examples, fraction, seed)
    assert [id(e) for e in again[1]] == [id(e) for e in held_out]


def test_the_split_has_its_share_and_depends_on_the_seed() -> None:
    examples = make_examples(range(1000))
    assert len(split(examples, 0.05, 1)[1]) == 50
    assert split(examples, 0.0, 1)[1] == []
    held_out = [{e.group for e in split(examples, 0.05, seed)[1]} for seed in (1, 2)]
    assert held_out[0] != held_out[1]
    order_changed = split(examples[::-1], 0.05, 1)[1]
    assert {e.group for e in order_changed} == held_out[0], "the order of the rows doesn't matter"


def test_equal_rows_are_one_group(make_tokenizer: Maker) -> None:
    rows = [conversation("Hi", "Hello"), conversation("Hi", "Hello"), conversation("Hi", "Bye")]
    first, second, third = tokenize_rows(rows, make_tokenizer(), seq_len=4096).examples
    assert first.group == second.group != third.group


def test_lengths_are_those_before_truncation(make_tokenizer: Maker, tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "a", "completion": "b" * n} for n in range(1, 101)])
    lengths = token_lengths(path, make_tokenizer())
    whole = tokenize_rows(load_rows(path), make_tokenizer(), seq_len=4096)
    assert lengths.total_tokens == whole.facts.num_tokens
    assert lengths.max_tokens - lengths.p50_tokens == 50
    assert lengths.p99_tokens == lengths.max_tokens - 1
    assert lengths.num_rows == 100


def test_a_tokenizer_that_is_larger_than_the_embedding(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer()
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(
        DataError, match=f"its largest id is {len(tokenizer) - 1}, but the embedding has 100 rows"
    ):
        check_vocabulary(tokenizer, 100)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"prompt": "Hi", "completion": "Hello"}])
    parquet.write_table(table, tmp_path / "d.parquet")
    assert load_rows(tmp_path / "d.parquet")[0].messages == conversation("Hi", "Hello").messages
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="can't be read as Parquet"):
        load_rows(tmp_path / "d.parquet")


def write(folder: Path, records: list[dict[str, str]]) -> Path:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def as_lists(tokenized: Tokenized) -> list[tuple[list[int], list[int], str, int | None]]:
    return [(e.input_ids.tolist(), e.labels.tolist(), e.group, e.row) for e in tokenized.examples]


def test_examples_know_their_rows(make_tokenizer: Maker) -> None:
    texts = [Row(text=text, line=9, path="x") for text in ("a", "a b c d e f g", "h i")]
    found = tokenize_rows(texts, make_tokenizer(), seq_len=6, objective="pretrain").examples
    rows = [example.row for example in found]
    assert rows == sorted(rows)
    assert set(rows) == {1, 2, 3}
    assert rows.count(2) > 1


def test_the_cache_gives_the_same_and_heals(
    make_tokenizer: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, [{"prompt": "Hi", "completion": "b" * n} for n in range(1, 20)])

    def run(seq_len: int = 64, template: str = CHATML) -> Tokenized:
        return tokenize_file(path, make_tokenizer(template), seq_len=seq_len, cache_dir=tmp_path / "cache")

    fresh = tokenize_rows(load_rows(path), make_tokenizer(), seq_len=64)
    first, second = run(), run()
    assert as_lists(first) == as_lists(second) == as_lists(fresh)
    assert first.facts == second.facts == fresh.facts
    [cached] = (tmp_path / "cache" / "tokens").iterdir()
    whole = cached.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damage in (b"", whole[:-7], whole[:100], b"x" * 50, bytes(flipped)):
        cached.write_bytes(damage)
        capsys.readouterr()
        assert as_lists(run()) == as_lists(fresh)
        assert "is damaged" in capsys.readouterr().err
        assert cached.read_bytes() == whole
    capsys.readouterr()
    run(seq_len=32)
    run(template=TEMPLATES["marker"])
    write(tmp_path, [{"prompt": "Hi", "completion": "other"}])
    assert as_lists(run()) != as_lists(fresh)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 4
    assert capsys.readouterr().err == ""


def test_without_a_cache_folder_it_works_and_says_so(
    make_tokenizer: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, [{"prompt": "Hi", "completion": "b"}])
    result = tokenize_file(path, make_tokenizer(), seq_len=64, cache_dir=path)
    assert len(result.examples) == 1
    assert "is not kept" in capsys.readouterr().err


def test_lengths_for_the_planner_are_those_that_training_sees(make_tokenizer: Maker, tmp_path: Path) -> None:
    from bench.encode import documents
    from bench.lengths import _light_counter
    from bench.weights import load_tokenizer
    from planner.setup import TrainSetup

    make_tokenizer().save_pretrained(tmp_path)
    setup = TrainSetup(model="x", tokenizer=str(tmp_path))
    rows = [chat_row("Hello world"), chat_row("你好")]
    count = _light_counter(setup)
    assert count is not None
    assert count(rows) == [len(d.ids) for d in documents(rows, load_tokenizer(setup), "sft")]


def chat_row(text: str) -> Row:
    turns = (Message(role="user", content="Hi"), Message(role="assistant", content=text))
    return Row(messages=turns, line=1, path="d.jsonl")


def test_two_bos_tokens_stop(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML)
    with pytest.raises(DataError, match=r"d.jsonl:1: 1 of 1 rows begin with two BOS tokens"):
        tokenize_rows([conversation("Hi", "Hello!")], tokenizer, seq_len=100)


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_a_template_that_serves_other_words_than_it_trains_is_told(
    make_tokenizer: Maker, name: str
) -> None:
    rows = [conversation("Hi", "Hello!"), conversation("Hi the", "Hello!", "And the rest?", "end 12")]
    finding = find_unlike_serving(rows, make_tokenizer(TEMPLATES[name]))
    assert (finding is not None) == (name == "no generation prompt")


def test_labels_that_padding_swallows_stop(make_tokenizer: Maker) -> None:
    from bench.batching import collate

    tokenizer = make_tokenizer()
    rows = [conversation("Hi", "Hello!"), conversation("Hi", "Longer, so that the other one is padded")]
    batch = [[example] for example in tokenize_rows(rows, tokenizer, seq_len=100).examples]
    whole = collate(batch, pad_id=tokenizer.pad_token_id)
    assert find_lost_labels(batch, whole) is None
    masked = whole["labels"].masked_fill(whole["input_ids"] == tokenizer.pad_token_id, -100)
    finding = find_lost_labels(batch, {**whole, "labels": masked})
    assert finding is not None
    assert finding.audit == "pad-is-eos"
