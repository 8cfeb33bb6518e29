"""Hub sources against a small server that speaks the hub's protocol: configs to plan, weights only to apply."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPOSITORY = "someone/tiny-sana"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Cli = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ["workload.height=64", "workload.width=64", "workload.steps=1", "precision=fp32"]


@dataclass
class Hub:
    """A hub with one repository: `fetched` are whole files served, `ranges` those of which a part was asked for."""

    folder: Path
    url: str = ""
    fetched: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Answers about the repository of `served`."""

    protocol_version = "HTTP/1.1"
    served: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        root = self.served.folder
        files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
        if self.path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            entries = [{"type": "file", "path": k, "size": p.stat().st_size, "oid": k} for k, p in files.items()]
            self.answer(json.dumps(entries).encode(), 200, body)
        elif self.path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode(), 200, body)
        else:
            name = self.path.partition(f"/{REPOSITORY}/resolve/")[2].partition("/")[2]
            self.file(name, files[name].read_bytes(), body) if name in files else self.answer(b"", 404, body)

    def file(self, name: str, content: bytes, body: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        wanted = self.headers.get("Range") if body else None
        if wanted:
            self.served.ranges.append(name)
            first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            part = content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            self.answer(part, 206, body, headers)
            return
        if body:
            self.served.fetched.append(name)
        self.answer(content, 200, body, headers)

    def answer(self, content: bytes, code: int, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tiny: Path, tmp_path: Path) -> Iterator[Hub]:
    served = Hub(Path(shutil.copytree(tiny, tmp_path / "served")))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Handler,), {"served": served}))
    served.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub: Hub, cli: Cli, tmp_path: Path) -> Cli:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # fmt: skip

    def start(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return cli("model=checkpoint", f"model.source={REPOSITORY}", *SMALL, *arguments, **{**environment, **more})

    return start


def weights(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


@pytest.mark.slow
def test_planning_fetches_configs_and_headers_and_applying_the_weights_of_that_commit(
    hub: Hub, run: Cli, cli: Cli, tmp_path: Path
) -> None:
    planned = run("until=resolve")
    assert planned.returncode == 0, planned.stderr
    assert weights(hub.fetched) == []
    assert len(weights(hub.ranges)) == 4
    (path,) = (tmp_path / "outputs").glob("*/*/plan.json")
    plan = json.loads(path.read_text())
    assert plan["checkpoint"]["revision"] == COMMIT
    local = cli("until=compile", *SMALL)
    assert local.returncode == 0, local.stderr
    mine = [p for p in (tmp_path / "outputs").glob("*/*/plan.json") if p != path]
    assert json.loads(mine[0].read_text())["components"] == plan["components"]

    applied = run("until=apply")
    assert applied.returncode == 0, applied.stderr
    assert len(weights(hub.fetched)) == 4
    offline = run("until=apply", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


def test_offline_without_the_weights_it_says_so(hub: Hub, run: Cli) -> None:
    assert run("until=compile").returncode == 0
    ended = run("until=compile", HF_HUB_OFFLINE="1")
    assert ended.returncode == 3
    assert "their headers cannot be read" in ended.stderr
    assert "hf download" in ended.stderr


def test_what_is_missing_or_damaged_there_is_named(hub: Hub, run: Cli) -> None:
    (hub.folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no header at all, that is certain")
    ended = run("until=compile")
    assert ended.returncode == 3, ended.stderr
    assert "a header of vae in someone/tiny-sana is damaged" in ended.stderr
    (hub.folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    ended = run("until=compile")
    assert "someone/tiny-sana has no safetensors file in vae" in ended.stderr
