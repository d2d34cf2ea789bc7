"""Uploads to a local stand-in for the hub's API, and the model card that it gets."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from etils import epath
from huggingface_hub import ModelCard, constants
from rows import write_lines

from camopd_jax.config.schema import Benchmark, BranchConfig, Evaluation, Stream, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.inference.loading import Loaded
from camopd_jax.runs import card, hub

REPOSITORY = "clinic/recovered"


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub: create, preupload, LFS, commit. `status` is that of the first call."""

    status, created, files, tokens = 200, [], {}, set()

    def do_POST(self):
        Hub.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            Hub.created.append(json.loads(body))
            self.answer({"url": f"{constants.ENDPOINT}/{REPOSITORY}"}, Hub.status)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            self.answer({"files": [{"path": path, "uploadMode": modes[path.endswith(".safetensors")],
                                    "shouldIgnore": False} for path in files]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {"upload": {"href": f"{constants.ENDPOINT}/store"}}
            self.answer({"transfer": "basic", "objects": [of | {"actions": upload} for of in objects]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    Hub.files[line["value"]["path"]] = Hub.files.pop(line["value"]["oid"])
            self.answer(
                {"commitUrl": f"{constants.ENDPOINT}/{REPOSITORY}/commit/0", "commitOid": "0" * 40, "success": True}
            )
        else:
            self.answer({}, 404)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        Hub.files[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self):
        self.answer({"error": "Repository not found"}, 404)

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Hub, "status", 200)
    for name, empty in (("created", []), ("files", {}), ("tokens", set())):
        monkeypatch.setattr(Hub, name, empty)
    served = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{served.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    huggingface_hub.close_session()
    yield Hub
    served.shutdown()
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "recovered"
    out.mkdir()
    (out / "README.md").write_text(f'---\nlibrary_name: transformers\nbase_model: "{tmp_path}"\n---\n\n# x\n')
    (out / "config.json").write_text('{"model_type": "llama"}')
    (out / "model.safetensors").write_bytes(bytes(range(256)) * 17)
    return out


def test_every_file_arrives_in_a_private_repository(server, folder):
    assert hub.push(folder, REPOSITORY, public=False) == f"{constants.ENDPOINT}/{REPOSITORY}"
    (request,) = server.created
    assert (request["organization"], request["name"]) == ("clinic", "recovered") and server.tokens == {
        "Bearer hf_secret"
    }
    assert request.get("private") is True or request.get("visibility") == "private"
    assert server.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert b"base_model" not in server.files["README.md"], "a local folder is no name on the hub"


@pytest.mark.parametrize(
    "status, message", [(401, "401: the token is not valid"), (403, "403: the token has no right to write there")]
)
def test_a_refusal_is_one_line_and_the_export_stays(status, message, server, folder, monkeypatch):
    monkeypatch.setattr(server, "status", status)
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(
        UserError, match=rf"\({message}\)\. The export is complete: .*`hf upload {REPOSITORY}"
    ) as caught:
        hub.push(folder, REPOSITORY, public=True)
    assert "\n" not in str(caught.value) and sorted(file.name for file in folder.iterdir()) == before
    assert not server.files


def test_no_network_is_one_line(server, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError, match=r"cannot upload to clinic/recovered \(ConnectError: .*The export is complete"):
        hub.push(folder, REPOSITORY, public=False)


def test_the_name_and_the_token_are_checked_before_the_export(monkeypatch):
    with pytest.raises(UserError, match="--push: 'recovered' is not a name on the hub; give ORGANISATION/NAME"):
        hub.check_push("recovered")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="--push: no token for the hub; set HF_TOKEN, or log in with `hf auth login`"):
        hub.check_push(REPOSITORY)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    hub.check_push(REPOSITORY)


def row(model, name, axis, scores, step=0):
    n = len(scores)
    return {"step": step, "model": model, "benchmark": name, "axis": axis, "accuracy": sum(scores) / n,
            "standard_error": 0.0, "n": n, "scores": scores}  # fmt: skip


def test_the_card_has_metadata_and_what_came_back_and_was_kept(tmp_path):
    rows = [
        row("general", "sums", "general", [1, 1, 1, 1]), row("specialised", "sums", "general", [0, 0, 0, 0]),
        row("student", "sums", "general", [1, 1, 1, 0], 6), row("general", "drugs", "domain", [0, 0]),
        row("specialised", "drugs", "domain", [1, 1]), row("student", "drugs", "domain", [1, 0], 6),
        row("student", "sums", "general", [0, 0, 0, 0], 3),
    ]  # fmt: skip
    write_lines(tmp_path / "eval.jsonl", rows)
    benchmarks = tuple(Benchmark(name=name, axis=axis) for name, axis in (("sums", "general"), ("drugs", "domain")))
    branches = {"recovery": BranchConfig(prompts=Stream("openai/gsm8k:main@cc7b047,own.jsonl"))}
    config = TrainConfig("g", "s", branches=branches, evaluation=Evaluation(benchmarks=benchmarks))
    record = card.read_record(epath.Path(tmp_path), config, 6)
    assert card.read_record(epath.Path(tmp_path), config, 3).results == {}, "one benchmark is missing there"
    original = tmp_path / "specialist"
    original.mkdir()
    (original / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    loaded = Loaded(original, None, None, {}, None, ())
    provenance = {"method": "CaMOPD", "specialised_model": "clinic/medqa-8b", "steps": "6"}
    (tmp_path / "README.md").write_text(text := card.model_card("x", provenance, loaded, record))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.datasets, data.license) == ("clinic/medqa-8b", ["openai/gsm8k"], "apache-2.0")
    assert data.tags == ["camopd", "on-policy-distillation"] and data.library_name == "transformers"
    table = {line.split(" | ")[0]: line for line in text.splitlines() if "±" in line and "|" in line}
    assert table["| general: sums"].startswith("| general: sums | 100.0 ± 0.0 | 0.0 ± 0.0 | 75.0 ±")
    assert table["| general: sums"].endswith("| 75 ± 25 % |") and "| 50 ± 50 % |" in table["| domain: drugs"]
    assert hub._without_local_base(text) == text
