"""Where a model's config.json comes from: folders, files, the Hugging Face cache, a hub (a real server on this machine)."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from planner import hub
from planner.errors import ConfigError, FinefitError, NotModelledError, UnknownNameError
from planner.resolve import resolve_model

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}
PARAMETERS = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 2 * 100 * 64 + 64


@pytest.fixture(autouse=True)
def no_hub_settings(monkeypatch, tmp_path):
    for name in (
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "USE_MODELSCOPE_HUB",
        "MODELSCOPE_DOMAIN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def server():
    """A hub on this machine: `answers` maps a path to (status, headers, body); `seen` keeps the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append((self.path, dict(self.headers)))
            status, headers, body = self.server.answers.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.seen, http.answers = [], {}
    http.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


def write_config(folder, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_and_its_file_are_the_same_model(tmp_path):
    folder = write_config(tmp_path / "mine")
    for path in (folder, folder / "config.json"):
        spec = resolve_model(str(path))
        assert (spec.name, spec.num_params, spec.hub_id) == ("mine", PARAMETERS, None)


def test_an_inline_mapping_needs_no_file():
    assert resolve_model(CONFIG).num_params == PARAMETERS


def test_a_folder_of_the_same_name_comes_before_the_profile(tmp_path, monkeypatch):
    write_config(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("gpt2").num_params == PARAMETERS
    assert resolve_model("openai-community/gpt2").family == "gpt2"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "model_type"),
        (b'{"model_type": 3}', "model_type"),
        (b'{"a": NaN, "model_type": "llama"}', "missing"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "' + b"x" * 2**20 + b'"}', "more than 1 MiB"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_broken_config_is_named_with_its_fault(tmp_path, content, words):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        resolve_model(str(tmp_path))
    assert str(file) in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FinefitError, match="config"):
        resolve_model(str(tmp_path / "config.json"))


def test_a_folder_whose_model_is_unknown_is_named(tmp_path):
    folder = write_config(tmp_path / "mine", {**CONFIG, "model_type": "qwen2_vl"})
    with pytest.raises(NotModelledError, match="out of scope"):
        resolve_model(str(folder))


def test_the_cache_is_looked_up_before_any_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = tmp_path / "hf" / "hub" / "models--someone--thing"
    write_config(cache / "snapshots" / "abc123")
    other = write_config(cache / "snapshots" / "def456", {**CONFIG, "vocab_size": 200})
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123\n")
    assert resolve_model("someone/thing", offline=False).num_params == PARAMETERS
    assert resolve_model("someone/thing", revision="def456").vocab_size == 200
    assert other.is_dir()


def test_offline_an_unknown_hub_id_is_an_unknown_name():
    with pytest.raises(UnknownNameError, match=r"nearest: .*Mistral-7B"):
        resolve_model("mistralai/Mistral-7B-v9")


def test_hf_hub_offline_is_said_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FinefitError, match="HF_HUB_OFFLINE"):
        resolve_model("someone/thing", offline=False)


def test_a_mirror_is_asked_and_never_told_the_token(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    server.answers["/someone/thing/resolve/v1.0/config.json"] = (200, {}, json.dumps(CONFIG).encode())
    spec = resolve_model("someone/thing", revision="v1.0", offline=False)
    assert (spec.hub_id, spec.num_params) == ("someone/thing", PARAMETERS)
    [(_, headers)] = server.seen
    assert "Authorization" not in headers and "secret" not in str(headers)


def test_the_token_goes_to_the_hub_and_not_along_its_redirect(server, monkeypatch):
    monkeypatch.setattr(hub, "HUGGING_FACE", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    elsewhere = server.url.replace("127.0.0.1", "localhost") + "/file"
    server.answers["/someone/thing/resolve/main/config.json"] = (302, {"Location": elsewhere}, b"")
    server.answers["/file"] = (200, {}, json.dumps(CONFIG).encode())
    assert resolve_model("someone/thing", offline=False).num_params == PARAMETERS
    first, second = (headers for _, headers in server.seen)
    assert first["Authorization"] == "Bearer secret"
    assert "Authorization" not in second


def test_modelscope_is_asked_in_its_own_way(server, monkeypatch):
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    path = "/api/v1/models/someone/thing/repo?Revision=master&FilePath=config.json"
    server.answers[path] = (200, {}, json.dumps(CONFIG).encode())
    assert resolve_model("someone/thing", offline=False).num_params == PARAMETERS
    assert "secret" not in str(server.seen)


def test_the_default_addresses(monkeypatch):
    assert hub.config_url("a/b", None) == "https://huggingface.co/a/b/resolve/main/config.json"
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert hub.config_url("a/b", "v2").startswith(
        "https://www.modelscope.cn/api/v1/models/a/b/repo?Revision=v2&"
    )


@pytest.mark.parametrize(
    ("status", "words"), [(401, "login"), (403, "owner"), (404, "no such model"), (500, "HTTP 500")]
)
def test_a_refusal_says_why(server, monkeypatch, status, words):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.answers["/someone/thing/resolve/main/config.json"] = (status, {}, b"<html>")
    with pytest.raises(FinefitError, match=words) as caught:
        resolve_model("someone/thing", offline=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", [b"<html>no</html>", b"{", b'{"x": "' + b"y" * 2**21 + b'"}'])
def test_a_hub_that_answers_nonsense_is_a_config_error(server, monkeypatch, body):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.answers["/someone/thing/resolve/main/config.json"] = (200, {}, body)
    with pytest.raises(ConfigError):
        resolve_model("someone/thing", offline=False)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "file:///etc", "nonsense", "http://[::1"])
def test_no_network_and_no_address_are_one_line(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(FinefitError) as caught:
        resolve_model("someone/thing", offline=False)
    assert "\n" not in str(caught.value)


def test_a_classifier_has_its_own_head():
    spec = resolve_model("bert-base-uncased", objective="seq-cls")
    assert spec.num_params == 109_483_778
    assert (spec.head.path, spec.head.out_features, spec.tied_head) == ("classifier", 2, False)
