"""Publishing: the folder that goes to a hub, and an upload to a stand-in that speaks its HTTP API."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
from huggingface_hub import ModelCard

from pipeline.cli import main
from pipeline.evaluate.evaluation import Request, evaluate
from pipeline.files import sha256
from pipeline.models.extract import extract

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(trained_run, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("publish")
    run = shutil.copytree(trained_run, home / "run")
    evaluate(Request(run, subnets=["32x2"]))
    return extract(run, ["32x2"], home / "models")[0].path


def test_a_dry_run_writes_what_would_be_uploaded(model, tmp_path, capsys):
    out = tmp_path / "folder"
    assert main(["publish", str(model), "--repo", "ann/tiny", "--dry-run", "--out", str(out), "--license", "mit"]) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in model.iterdir())
    proof = json.loads((out / "proof.json").read_text())
    assert {name: sha256(out / name) for name in proof["files"]} == proof["files"]
    assert timm.create_model(f"local-dir:{out}", pretrained=True).num_features == 32
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-feature-extraction")
    assert {"timm", "self-supervised"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", proof["knn"]["accuracy"])
    assert "hf-hub:ann/tiny" in card.text
    assert "PATH_OF_THIS_DIRECTORY" not in card.text


class Hub(BaseHTTPRequestHandler):
    """As much of a hub's HTTP API as an upload asks for; keeps what it is sent."""

    seen: ClassVar[dict[str, Any]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        base = f"http://{self.headers['Host']}"
        if self.headers["Authorization"] != "Bearer hf_stand_in":
            return self._answer({"error": "who are you?"}, 401)
        if self.path == "/api/repos/create":
            self.seen["repo"] = json.loads(body)
            return self._answer({"url": f"{base}/ann/tiny"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path == "/api/models/ann/tiny/preupload/main":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self._answer({"files": files})
        if self.path.startswith("/api/models/ann/tiny/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            self.seen["message"] = lines[0]["value"]["summary"]
            for line in lines[1:]:
                self.seen[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{base}/ann/tiny/commit/1"})
        return self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self._answer({"id": "ann/tiny", "sha": "0" * 40, "siblings": []})

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Be silent."""


def test_an_upload_is_one_commit_of_these_files_and_a_refusal_is_one_line(model):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_stand_in", "PYTHONPATH": str(ROOT)}
    code = (
        "import os, sys; from pipeline.cli import main; from huggingface_hub import constants\n"
        "words = sys.argv[1:]; first = main(words); os.environ['HF_TOKEN'] = 'hf_wrong'\n"
        "sys.exit(first or main(words) - 2 or 'torch' in sys.modules)"  # which would be most of the time it takes
    )
    try:
        words = ["publish", str(model), "--repo", "ann/tiny", "--private"]
        done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert f"{address}/ann/tiny/commit/1" in done.stdout
    assert "hf-hub:ann/tiny" in done.stdout
    assert Hub.seen.pop("message").startswith("Add 32x2, teacher after 8 steps, checkpoint ")
    repo = Hub.seen.pop("repo")
    assert repo["name"] == "tiny"
    assert repo["organization"] == "ann"
    assert set(Hub.seen) == {path.name for path in model.iterdir()}
    proof = json.loads(Hub.seen["proof.json"])
    assert {name: hashlib.sha256(Hub.seen[name]).hexdigest() for name in proof["files"]} == proof["files"]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the hub refuses" in line
    assert "ann/tiny" in line


def test_what_cannot_be_published_is_one_line(model, tmp_path, capsys, monkeypatch):
    changed = shutil.copytree(model, tmp_path / "changed")
    (changed / "config.json").write_text("{}")
    cases = [
        ((model, "--repo", "tiny"), "no name on a hub"),
        ((model, "--repo", "ann/ti ny"), "no name on a hub"),
        ((tmp_path, "--repo", "ann/tiny"), "no extracted model"),
        ((changed, "--repo", "ann/tiny"), "not the one that was proven"),
        ((model, "--repo", "ann/tiny", "--dry-run", "--out", tmp_path), "in the way"),
    ]
    for words, part in cases:
        assert main(["publish", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line


def test_a_folder_that_could_not_be_filled_is_not_there(model, tmp_path, capsys, monkeypatch):
    def full(source, target):
        Path(target).touch()
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    assert main(["publish", str(model), "--repo", "ann/tiny", "--dry-run", "--out", str(tmp_path / "a" / "b")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write: No space left on device")
    assert not any(tmp_path.iterdir())
