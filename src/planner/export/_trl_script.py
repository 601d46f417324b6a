"""The parts of the train.py that the TRL export writes.

Parts are constant texts; all that a user chose stands in the constants above them, written by `repr`.
"""

from __future__ import annotations

HEAD = '''\
"""{what} with TRL. Made by finefit from a plan; {config_file} beside it belongs to it.

Start it with: {start}
Paths are relative to the folder that it is started from.
"""

{imports}
'''

READ_TABLE = '''\
READERS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tsv": "csv",
    ".txt": "text",
}


def read_table():
    """A file, a folder of files, or a hub data set written org/name:split."""
    path = Path(DATA)
    if path.suffix.lower() not in READERS and not path.is_dir():
        name, _, split = DATA.partition(":")
        return load_dataset(name, split=split or "train")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS)
    suffix = files[0].suffix.lower()
    options = {"sep": "\\t"} if suffix == ".tsv" else {}
    return load_dataset(READERS[suffix], data_files=[str(f) for f in files], split="train", **options)
'''

ROLES = """\
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
"""

SFT_ROWS = '''\
QUESTIONS, ANSWERS = ("instruction", "prompt", "question"), ("output", "response", "completion", "answer")


def to_turns(row):
    """One row as [{"role": …, "content": …}], whichever of the usual columns it has."""
    given = row.get("messages") or row.get("conversations")
    if given:
        pairs = [(turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")) for turn in given]
    else:
        question = next(row[name] for name in QUESTIONS if row.get(name))
        context = "instruction" in row and (row.get("input") or row.get("context")) or ""
        earlier = [text for pair in row.get("history") or [] for text in pair]
        pairs = list(zip(("user", "assistant") * len(earlier), earlier))
        pairs.append(("user", "\\n\\n".join(part for part in (question, context) if part.strip())))
        pairs.append(("assistant", next(row[name] for name in ANSWERS if row.get(name))))
    if row.get("system"):
        pairs.insert(0, ("system", row["system"]))
    return [{"role": ROLES.get(role, role), "content": content} for role, content in pairs]


def to_example(row):
    """TRL takes the loss on the completion alone: here, on the last answer of the conversation."""
    turns = to_turns(row)
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "assistant")
    answers = sum(turn["role"] == "assistant" for turn in turns)
    return {"prompt": turns[:last], "completion": [turns[last]], "answers": answers}


def load_rows():
    table = read_table()
    rows = table.map(to_example, remove_columns=table.column_names)
    several = sum(number > 1 for number in rows["answers"])
    if several:
        print(f"{several} rows have several answers; TRL trains on the last one of each", file=sys.stderr)
    return rows.remove_columns("answers")
'''

PAIR_ROWS = '''\
PROMPTS = ("prompt", "instruction", "question", "conversations")


def turns(value, role):
    """A text of that role, one turn, or a list of turns, as [{"role": …, "content": …}]."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    given = value if isinstance(value, list) else [value]
    pairs = [(turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")) for turn in given]
    return [{"role": ROLES.get(name, name), "content": content} for name, content in pairs]


def before(row):
    """The turns that come before both answers; none where each answer is a whole conversation."""
    value = next((row[name] for name in PROMPTS if row.get(name)), [])
    earlier = []
    if isinstance(value, str):
        context = "instruction" in row and row.get("input") or ""
        value = "\\n\\n".join(part for part in (value, context) if part.strip())
        earlier = [text for pair in row.get("history") or [] for text in pair]
    first = turns(row["system"], "system") if row.get("system") else []
    pairs = zip(("user", "assistant") * len(earlier), earlier)
    return first + [{"role": role, "content": text} for role, text in pairs] + turns(value, "user")


def to_conversations(row):
    """The chosen conversation and the rejected one, whichever of the usual columns the row has."""
    if row.get("rejected_response"):
        system = turns(row["system"], "system") if row.get("system") else []
        chosen = system + turns(row["messages"], "user")
        return chosen, chosen[:-1] + turns(row["rejected_response"], "assistant")
    answers = [
        turns(row.get(name) or row[f"response_{name}"], "assistant") for name in ("chosen", "rejected")
    ]
    return [answer if answer[0]["role"] != "assistant" else before(row) + answer for answer in answers]


def to_example(row):
    """The prompt is what both conversations share."""
    chosen, rejected = to_conversations(row)
    shared = next(n for n, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def load_rows():
    table = read_table()
    return table.map(to_example, remove_columns=table.column_names)
'''

TEXT_ROWS = """\
def load_rows():
    return read_table().select_columns("text")
"""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""What finefit's own run gives a tokenizer that has no chat template; a test keeps the two equal."""

TEMPLATE = """\
def give_template(tokenizer):
    if not tokenizer.chat_template:
        begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
"""

SPLIT = '''\
def split(rows):
    """(train, held out); not the same rows that finefit holds out."""
    parts = rows.train_test_split(test_size=EVAL_FRACTION, seed=SEED)
    return parts["train"], parts["test"]
'''

LOAD_MODEL = """\
def load_model():
{body}    return model
"""

PRETRAINED = """\
    model = AutoModelForCausalLM.from_pretrained(MODEL, **MODEL_OPTIONS)
"""

QUANTISED = """\
    quantisation = BitsAndBytesConfig(**QUANTISATION)
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=quantisation, **MODEL_OPTIONS)
"""

RANDOM = """\
    config = AutoConfig.from_pretrained(MODEL, revision=REVISION)
    model = AutoModelForCausalLM.from_config(config, **MODEL_OPTIONS)
"""

KBIT_UPCAST = """\
    # The 16-bit weights that bitsandbytes left alone go to float32.
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
"""

ADAPTERS = """\
    adapter = {peft_class}(task_type="CAUSAL_LM", **ADAPTER)
    model = get_peft_model(model, adapter, autocast_adapter_dtype={autocast})
"""

ADAPTER_CAST = """\
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.{dtype})
"""

FREEZE = """\
    for name, parameter in model.named_parameters():
        if any(part in name for part in {parts!r}):
            parameter.requires_grad = False
"""

MAIN = """\
def main():
{gpu_check}    here = Path(__file__).parent
    args = {config}(**yaml.safe_load((here / "{config_file}").read_text(encoding="utf-8")))
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, revision=TOKENIZER_REVISION)
{template}    train_rows, eval_rows = {rows}
    trainer = {trainer}(
        model=load_model(),
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
"""

GPU_CHECK = """\
    if torch.cuda.device_count() != NUM_GPUS:
        sys.exit(f"the plan spreads the layers over {NUM_GPUS} GPUs, here are {torch.cuda.device_count()}")
"""
