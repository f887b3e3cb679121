"""Extraction over HTTP from servers that answer right, wrong, late, and not at all."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests
import torch
from extract_world import check_store, make_hd32_model, manifest, shard_bytes

import fusechat
from fusechat.config import parse_config, parse_extract
from fusechat.dialogue import load_dialogues
from fusechat.errors import ConfigError, DataError, FusechatError
from fusechat.extract import server
from fusechat.http_reply import reply_text
from fusechat.model import load_model
from fusechat.plan.models import model_shape
from fusechat.records import Dialogue
from fusechat.reporter import Reporter
from fusechat.run import run


@dataclass
class Stub:
    """A vLLM server as seen from outside, on a model of ours; `before` may answer a request in its stead."""

    model: Any
    name: str
    max_model_len: int = 4096
    before: Callable[[Stub, dict[str, Any]], tuple[int, Any] | None] = lambda stub, body: None
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name, "root": self.name, "max_model_len": self.max_model_len}]}
        self.requests.append(body)
        early = self.before(self, body)
        return early if early is not None else (200, self.change(self.completion(body)))

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = torch.tensor(body["prompt"])
        with torch.no_grad():
            logprobs = torch.log_softmax(self.model(input_ids=ids[None]).logits[0].float(), -1)
        entries: list[Any] = [None]
        for row, token in zip(logprobs, ids[1:].tolist()):
            top = row.topk(body["prompt_logprobs"])
            entry = {str(token): {"logprob": row[token].item(), "rank": int((row >= row[token]).sum())}}
            for rank, (value, index) in enumerate(zip(top.values.tolist(), top.indices.tolist()), 1):
                entry[str(index)] = {"logprob": value, "rank": rank}
            entries.append(entry)
        return {"choices": [{"text": "", "prompt_logprobs": entries}]}


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.respond({})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, body: dict[str, Any]) -> None:
            stub.keys.append(self.headers.get("Authorization"))
            status, content = stub.answer(self.path, body)
            if status == 0:  # dies without a word
                self.close_connection = True
                self.connection.close()
                return
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.handle_error = lambda *_: None  # type: ignore[method-assign]
    stub.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture(scope="module")
def directory(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hd32_model(tmp_path_factory.mktemp("served") / "tiny", tiny_world.pivot)


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return load_model(directory)


@pytest.fixture(scope="module")
def dialogues(tiny_world: Any) -> list[Dialogue]:
    return load_dialogues(tiny_world.dialogues)[:12]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_BACKOFF_S", 0.005)


def _extract(directory: Path, dialogues: list[Dialogue], out: Path, *stubs: Stub, **options: Any) -> Any:
    return fusechat.extract(
        str(directory), dialogues, out, backend="vllm-server", servers=[stub.url for stub in stubs], top_k=6,
        shard_dialogues=3, dtype="float32", **options,
    )  # fmt: skip


def test_rows_over_http_are_the_models_own(directory: Path, model: Any, dialogues: Any, tmp_path: Path) -> None:
    with serving(Stub(model, str(directory))) as one, serving(Stub(model, "tiny")) as two:
        _extract(directory, dialogues, tmp_path / "s", one, two)
    check_store(tmp_path / "s", directory)
    assert one.requests
    assert two.requests
    engines = manifest(tmp_path / "s")["engines"]
    assert {engine["url"] for engine in engines} <= {one.url, two.url}
    assert {(engine["name"], engine["version"]) for engine in engines} == {("vllm-server", "0.32.0")}
    assert all(isinstance(token, int) for request in one.requests for token in request["prompt"])


def test_the_key_is_read_from_the_environment_and_asked_for(
    directory: Path, model: Any, dialogues: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OTHER_KEY", "other")
    with serving(Stub(model, "tiny")) as stub:
        _extract(directory, dialogues[:2], tmp_path / "s", stub)
        assert set(stub.keys) == {"Bearer secret"}
        stub.before = lambda stub, body: (401, {"error": {"message": "no"}})
        with pytest.raises(DataError, match="correct the one in OPENAI_API_KEY"):
            _extract(directory, dialogues[:3], tmp_path / "t", stub)
        stub.before = lambda stub, body: (400, {"error": {"message": "no such thing as 'Bearer secret'"}})
        with pytest.raises(DataError, match="no such thing as 'Bearer …'"):
            _extract(directory, dialogues[:3], tmp_path / "t", stub)
        stub.keys.clear()
        stub.before = lambda stub, body: None
        _extract(directory, dialogues[:2], tmp_path / "other", stub, api_key_env="OTHER_KEY")
        assert set(stub.keys) == {"Bearer other"}
        stub.before = lambda stub, body: (401, {"error": {"message": "no"}})
        with pytest.raises(DataError, match="put it into the environment variable NO_KEY"):
            _extract(directory, dialogues[:3], tmp_path / "t", stub, api_key_env="NO_KEY")
    assert "secret" not in (tmp_path / "s" / "manifest.json").read_text()
    with pytest.raises(ConfigError, match="api_key_env is no name"):
        parse_extract({"backend": "vllm-server", "servers": ["http://h"], "api_key_env": "sk-secret"})


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_passing_failures_are_retried(directory: Path, model: Any, dialogues: Any, tmp_path: Path, status: int) -> None:
    def every_third_fails(stub: Stub, body: dict[str, Any]) -> tuple[int, Any] | None:
        return (status, {}) if len(stub.requests) % 3 == 1 else None

    with serving(Stub(model, "tiny")) as whole:
        _extract(directory, dialogues, tmp_path / "whole", whole)
    with serving(Stub(model, "tiny", before=every_third_fails)) as stub:
        _extract(directory, dialogues, tmp_path / "s", stub, concurrency=1)
    assert len(stub.requests) > len(whole.requests)
    assert shard_bytes(tmp_path / "s") == shard_bytes(tmp_path / "whole")


def test_an_endpoint_that_dies_costs_only_its_unfinished_shards(
    directory: Path, model: Any, dialogues: Any, tmp_path: Path
) -> None:
    def dies(stub: Stub, body: dict[str, Any]) -> tuple[int, Any] | None:
        return (0, None) if len(stub.requests) > 5 else None

    with serving(Stub(model, "tiny")) as well, serving(Stub(model, "tiny", before=dies)) as ill:
        _extract(directory, dialogues, tmp_path / "s", well, ill)
        check_store(tmp_path / "s", directory)
        ill.requests.clear()
        with pytest.raises(FusechatError, match=r"does not answer.*it resumes"):
            _extract(directory, dialogues, tmp_path / "t", ill)
        done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*.safetensors")}
        assert done, "what was finished before the endpoint died stays"
        _extract(directory, dialogues, tmp_path / "t", well)
    assert {n: t for n, t in done.items() if (tmp_path / "t" / n).stat().st_mtime_ns == t} == done
    assert shard_bytes(tmp_path / "s") == shard_bytes(tmp_path / "t")


def test_a_closed_port_is_named(directory: Path, model: Any, dialogues: Any, tmp_path: Path) -> None:
    with serving(Stub(model, "tiny")) as stub:
        pass
    with pytest.raises(FusechatError, match=f"{stub.url} does not answer"):
        _extract(directory, dialogues, tmp_path / "s", stub)
    assert not (tmp_path / "s").exists()


def _without(answer: dict[str, Any]) -> dict[str, Any]:
    del answer["choices"][0]["prompt_logprobs"]
    return answer


def _shifted(answer: dict[str, Any]) -> dict[str, Any]:
    entries = answer["choices"][0]["prompt_logprobs"]
    answer["choices"][0]["prompt_logprobs"] = [None, *entries[2:], entries[1]]
    return answer


def _infinite(answer: dict[str, Any]) -> dict[str, Any]:
    for entry in answer["choices"][0]["prompt_logprobs"][1:]:
        for value in entry.values():
            value["logprob"] = -9999.0
    return answer


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"name": "other-model"}, "serves other-model, not .*served_model"),
        ({"max_model_len": 40}, "takes prompts of less than 40 tokens.*--max-model-len"),
        ({"change": _without}, "gives no prompt_logprobs"),
        ({"change": _shifted}, "not the 6 likeliest of each token it was sent"),
        ({"change": lambda answer: ["junk"]}, "not a completion"),
        ({"before": lambda stub, body: (200, b"<html>hello</html>")}, "not JSON"),
        ({"before": lambda stub, body: (400, {"error": {"message": "token id 999 is\nout of vocabulary"}})}, "refuses"),
    ],
)  # fmt: skip
def test_servers_that_cannot_serve_are_refused_in_one_line(
    directory: Path, model: Any, dialogues: Any, tmp_path: Path, fault: Any, message: str
) -> None:
    with serving(Stub(**{"model": model, "name": "tiny"} | fault)) as stub, pytest.raises(DataError) as error:
        _extract(directory, dialogues, tmp_path / "s", stub)
    assert error.match(message)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s").exists()


def test_a_folder_with_an_at_sign_is_no_hub_id(model: Any, dialogues: Any, tmp_path: Path, tiny_world: Any) -> None:
    """Catches a path that is cut like owner/name@revision, so that the server of its model is another's."""
    here = make_hd32_model(tmp_path / "me@home" / "tiny", tiny_world.pivot)
    with serving(Stub(model, "tiny")) as stub:
        _extract(here, dialogues[:2], tmp_path / "s", stub)
    with serving(Stub(model, "me")) as stub, pytest.raises(DataError, match="serves me, not"):
        _extract(here, dialogues[:2], tmp_path / "t", stub)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"error": {"message": "no room"}}, "no room"),
        ({"error": None, "message": "busy"}, "busy"),
        ({"error": {"message": None, "code": 7}}, "{'message': None, 'code': 7}"),
        ({"detail": "not found"}, "{'detail': 'not found'}"),
        ("", "an empty reply"),
    ],
)
def test_what_a_server_says_is_told(said: Any, told: str) -> None:
    """Catches "None" where the server gave its reason elsewhere."""
    reply = requests.Response()
    reply._content = json.dumps(said).encode()
    assert reply_text(reply, None) == told


def test_minus_infinity_after_the_probe_is_named(directory: Path, model: Any, dialogues: Any, tmp_path: Path) -> None:
    stub = Stub(model, "tiny")
    stub.change = lambda answer: answer if len(stub.requests) == 1 else _infinite(answer)
    with serving(stub), pytest.raises(DataError, match="infinite log-probability on dialogue 0, row 0"):
        _extract(directory, dialogues, tmp_path / "s", stub, concurrency=1)


def test_a_server_of_another_model_under_the_right_name_is_detected(
    directory: Path, model: Any, dialogues: Any, tmp_path: Path, tiny_world: Any
) -> None:
    """By the weights that are here; where they are not, by the other servers and by the shards made before."""
    other = load_model(make_hd32_model(tmp_path / "other" / "tiny", tiny_world.pivot, seed=1))
    with serving(Stub(other, "tiny")) as stub, pytest.raises(DataError, match="another model than the weights in"):
        _extract(directory, dialogues, tmp_path / "s", stub)
    remote = make_hd32_model(tmp_path / "remote" / "tiny", tiny_world.pivot)
    (remote / "model.safetensors").unlink()
    with serving(Stub(model, "tiny")) as right, serving(Stub(other, "tiny")) as wrong:
        with pytest.raises(DataError, match="another model than http"):
            _extract(remote, dialogues, tmp_path / "two", right, wrong)

        def half(stub: Stub, body: dict[str, Any]) -> tuple[int, Any] | None:
            return (0, None) if len(stub.requests) > 5 else None

        right.before = half
        right.requests.clear()
        with pytest.raises(FusechatError, match="does not answer"):
            _extract(remote, dialogues, tmp_path / "later", right)
        assert list((tmp_path / "later").glob("*.safetensors"))
        with pytest.raises(DataError, match="another model than the shards made by http"):
            _extract(remote, dialogues, tmp_path / "later", wrong)


def test_a_run_needs_a_served_sources_config_and_tokenizer_alone(
    directory: Path, model: Any, tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that dies in its last stage, or downloads 72B, to score a source that a server has."""

    class Heard(Reporter):
        notes: ClassVar[dict[str, str]] = {}

        def done(self, name: str, note: str) -> None:
            self.notes[name] = note

    remote = tmp_path / "remote"
    shutil.copytree(directory, remote, ignore=shutil.ignore_patterns("*.safetensors"))
    shape, _ = model_shape(str(directory))
    assert model_shape(str(remote)) == (replace(shape, name="remote", stored_dtype="", weight_bytes=None), "its config")
    monkeypatch.setattr(server, "_BACKOFF_S", 0.01)
    with serving(Stub(model, "remote")) as stub:
        served = {"backend": "vllm-server", "servers": [stub.url], "dtype": "float32"}
        values: dict[str, Any] = {
            "pivot": str(tiny_world.pivot),
            "sources": [{"model": str(tiny_world.source)}, {"model": str(remote), "extract": served}],
            "data": {"train": str(tiny_world.dialogues), "held_out_fraction": 0.25},
            "out": str(tmp_path / "run"),
            "extract": {"top_k": 4, "max_length_tokens": 200},
            "train": {"max_steps": 1, "batch_size": 6, "micro_batch_size": 6},
            "eval": {"bootstrap_samples": 100},
        }
        with serving(Stub(model, "another")) as wrong:
            values["sources"][1]["extract"] = served | {"servers": ["http://127.0.0.1:9", wrong.url]}
            with pytest.raises(DataError, match="serves another, not "):
                run(parse_config(values, "here"))
        values["sources"][1]["extract"] = served | {"servers": ["http://127.0.0.1:9"]}
        with pytest.raises(FusechatError, match="does not answer"):
            run(parse_config(values, "here"))
        assert not (tmp_path / "run").exists(), "what is seen at once must not be told after the pivot's extraction"
        values["sources"][1]["extract"] = served
        results = run(parse_config(values, "here"), reporter=Heard())
    models = results["groups"]["overall"]["models"]
    assert set(models) == {"pivot", "source source", "target source", "target remote", "sft", "merged"}
    assert Heard.notes["evaluate"].endswith("source remote is not scored: a server has it")


def test_servers_are_asked_for_and_only_by_their_backend(tmp_path: Path, dialogues: Any) -> None:
    with pytest.raises(ConfigError, match="needs servers"):
        fusechat.extract("x", dialogues, tmp_path / "s", backend="vllm-server")
    with pytest.raises(ConfigError, match="'localhost:8000' is no URL: write http://localhost:8000"):
        fusechat.extract("x", dialogues, tmp_path / "s", backend="vllm-server", servers=["localhost:8000"])
