"""The process that serves: the command, signals, exit codes, and the real tiny pipeline from end to end."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from serving import running
from sleeping import Sleeping

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.serving import Serving
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import UsageError
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.serve import command, engines, server
from sana_deploy.serve.engine import QueueFullError
from sana_deploy.serve.replica import PipelineReplica

TESTS = Path(__file__).parent
Run = Callable[..., subprocess.CompletedProcess[str]]
BODY = {"prompt": "x", "size": "64x64", "steps": 20}
SLEEPING = """
import sys
from sana_deploy import __main__
from sana_deploy.errors import RunError
from sana_deploy.facts import machine
from sana_deploy.serve import replica
from sleeping import Sleeping

class Replica(Sleeping):
    def __init__(self, resolved):
        super().__init__({step})

    def load(self):
        {load}

replica.PipelineReplica = Replica
machine.probe_torch = machine.probe  # without torch, which takes seconds to import
sys.argv = ["sana-deploy", "serve", "precision=fp32", "serve.port=0", *sys.argv[1:]]
__main__.command()
"""


class Process:
    """A service in a process of its own; what it says on stderr is read as it comes."""

    def __init__(self, command: list[str], folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "COLUMNS": "100"}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def url(self, word: str = "ready:", seconds: float = 90) -> str:
        """Wait for a line that says a URL."""
        end = time.monotonic() + seconds
        while not (found := re.search(rf"^{word}.*?(http://\S+)", self.said, re.MULTILINE)):
            assert time.monotonic() < end, self.said
            assert self.process.poll() is None, self.said
            time.sleep(0.02)
        return found[1]

    def ended(self, seconds: float = 30) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@contextmanager
def sleeping(folder: Path, *overrides: str, step: float = 0.02, load: str = "pass") -> Iterator[Process]:
    one = Process([sys.executable, "-c", SLEEPING.format(step=step, load=load), *overrides], folder)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


def post(url: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/images/generations", json={**BODY, **body}, timeout=60)


def wait_for(url: str, metric: str, value: float) -> None:
    end = time.monotonic() + 10
    while f"{metric} {value}" not in httpx2.get(f"{url}/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sigterm_finishes_what_was_accepted_refuses_what_comes_and_ends_with_0(tmp_path: Path) -> None:
    with sleeping(tmp_path) as one, ThreadPoolExecutor(4) as pool:
        url = one.url()
        accepted = [pool.submit(post, url, seed=seed) for seed in range(4)]
        wait_for(url, "sana_queue_length", 3.0)
        one.process.send_signal(signal.SIGTERM)
        until_stopping = time.monotonic() + 5
        while httpx2.get(f"{url}/ready").status_code == 200:
            assert time.monotonic() < until_stopping
        refused = post(url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_serving")
        assert [answer.result().status_code for answer in accepted] == [200] * 4
        assert one.ended() == 0
        assert "stopping: 4 pictures are finished first" in one.said
        assert one.said.rstrip().endswith("stopped")


def test_a_second_signal_and_the_end_of_patience_give_up_what_is_left_and_say_so(tmp_path: Path) -> None:
    for override, signals in (("serve.drain=60", 2), ("serve.drain=0.3", 1)):
        with sleeping(tmp_path, override, step=0.5) as one, ThreadPoolExecutor(1) as pool:
            url = one.url()
            left = pool.submit(post, url)
            wait_for(url, "sana_working", 1.0)
            for _ in range(signals):
                one.process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            answer = left.result()
            assert answer.status_code == 503
            assert "stopped" in answer.json()["error"]["message"]
            assert one.ended() == 0


def test_it_answers_while_it_loads_and_can_be_stopped_then(tmp_path: Path) -> None:
    with sleeping(tmp_path, load="import time; time.sleep(60)") as one:
        url = one.url("loading")
        ready = httpx2.get(f"{url}/ready", timeout=10)
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        assert httpx2.get(f"{url}/health").status_code == 200
        assert post(url).json()["error"]["message"] == "the model is still loading"
        one.process.send_signal(signal.SIGTERM)
        assert one.ended() == 0
        assert "ready:" not in one.said


def test_what_cannot_be_loaded_ends_it_with_the_code_of_the_failure(tmp_path: Path) -> None:
    with sleeping(tmp_path, load='raise RunError("out of memory on cuda:0", hint="a smaller model")') as one:
        assert one.ended(60) == 6
        assert "error: out of memory on cuda:0" in one.said
        assert "Traceback" not in one.said


def test_the_loss_of_the_last_gpu_ends_it_so_that_it_is_started_again(tmp_path: Path) -> None:
    with sleeping(tmp_path) as one:
        url = one.url()
        assert post(url, prompt="deadly").status_code in (500, 503)
        assert one.ended() == 6
        assert "the last replica was lost" in one.said


def test_the_log_has_a_line_for_each_request_with_its_id_and_none_for_probes(tmp_path: Path) -> None:
    with sleeping(tmp_path, step=0) as one:
        url = one.url()
        name = post(url).headers["x-request-id"]
        httpx2.get(f"{url}/health")
        httpx2.get(f"{url}/a%0Ab", headers={"X-Request-Id": "mine"})
        defect = post(url, prompt="defect").headers["x-request-id"]
        one.process.send_signal(signal.SIGTERM)
        assert one.ended() == 0
        assert re.search(rf"^\S+ INFO {name} POST /v1/images/generations 200 in \d+\.\d+ s$", one.said, re.MULTILINE)
        assert re.search(r"^\S+ INFO mine GET /a\\nb 404 in", one.said, re.MULTILINE)
        assert "/health" not in one.said.partition("ready:")[2]
        assert re.search(rf"ERROR drawing failed for {defect}\nTraceback", one.said), (
            "the log has what the client has not"
        )


def test_every_replica_of_a_plan_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = compose_spec(["machine=virtual", "machine.gpus=4xrtx4090", "hardware.replicas=2", "hardware.split=guidance",
                         "workload.guidance_scale=4.5"])  # fmt: skip
    plan = compile_spec(spec)
    resolved = plan.resolve()
    given: list[ResolvedPlan] = []

    class Noting(Sleeping):
        def __init__(self, one: ResolvedPlan) -> None:
            super().__init__(0)
            given.append(one)

    monkeypatch.setattr(engines, "PipelineReplica", Noting)
    service = command._service(resolved, spec, Serving(), ())
    assert [one.plan.digest for one in given] == [one.digest for one in plan.each()]
    assert [set(one.slot_devices.values()) for one in given] == [{"vgpu:0", "vgpu:1"}, {"vgpu:2", "vgpu:3"}]
    line = command._ready_line("http://x", resolved, service)
    assert line.endswith("on 2 replicas: vgpu:0, vgpu:1; vgpu:2, vgpu:3")
    planned = re.findall(r'sana_gpu_planned_bytes{device="vgpu:(\d)"} (\S+)', service.metrics.text().decode())
    wanted = {slot.index: slot.weights_bytes + slot.activation_bytes for slot in plan.all_slots}
    assert {int(index): float(size) for index, size in planned} == wanted
    assert len(wanted) == 4

    async def start() -> float:
        await service.engine.start()
        assert service.engine.standing.ready == 2
        with pytest.raises(QueueFullError) as caught:
            service.engine.admit(65)
        await service.engine.close()
        return caught.value.seconds

    assert asyncio.run(start()) == 0, "nothing is drawn or waits"


@pytest.mark.usefixtures("short_prompts")
def test_the_api_draws_the_bits_of_a_run(
    here: Run, small: Callable[..., DeploySpec], tiny: Path, tmp_path: Path
) -> None:
    plan = compile_spec(small("precision=fp32"))
    saved, edges = plan.save(tmp_path / "plan.json"), tmp_path / "edges.png"
    Image.effect_noise((96, 64), 90).convert("RGB").save(edges)
    ran = here(f"plan_file={saved}", f"workload.control_image={edges}", "workload.prompt=a red fox", "workload.seed=5")
    assert ran.returncode == 0, ran.stderr
    (wanted,) = tmp_path.rglob("image-000.png")
    resolved = plan.resolve()
    with running(resolved, PipelineReplica(resolved)) as api:
        body = {"prompt": "a red fox", "seed": 5, "control_image": base64.b64encode(edges.read_bytes()).decode()}
        answer = httpx2.post(f"{api.url}/v1/images/generations", json=body, timeout=60).json()
    drawn = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    with Image.open(wanted) as picture:
        assert drawn.tobytes() == picture.convert("RGB").tobytes()
    assert answer["sana_deploy"]["plan"] == plan.digest
    assert set(answer["sana_deploy"]["seconds"]) == {"encode", "prepare", "denoise", "decode", "generate"}


@pytest.mark.slow
def test_the_command_serves_a_saved_plan_from_end_to_end(
    small: Callable[..., DeploySpec], tiny: Path, tmp_path: Path
) -> None:
    plan = compile_spec(small("precision=fp32", "workload.guidance_scale=1")).save(tmp_path / "a plan.json")
    one = Process([sys.executable, "-m", "sana_deploy", "serve", f"plan_file={plan}", "serve.port=0"], tmp_path)
    try:
        url = one.url()
        assert httpx2.get(f"{url}/plan").text == plan.read_text()
        answer = post(url, size="64x32", steps=1)
        assert answer.status_code == 200, answer.text
        one.process.send_signal(signal.SIGTERM)
        assert one.ended() == 0
        assert "model tiny, 96x64 px, 2 steps, on cpu" in one.said
    finally:
        one.process.kill()
        one.process.wait()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["serve", "serve.port=99999"], 3, "serve.port: must be less than or equal to 65535"),
        (["serve", "serve.prt=1"], 1, "serve.prt: there is no such key"),
        (["serve", "plan.json"], 2, "'plan.json' is no override"),
        (["serve", "until=compile"], 2, "until is of a single run, a service has no use for it"),
        (["serve", "serve.queue=1"], 3, "most_images=10 must not exceed queue=1"),
        (
            ["serve", "serve.replicas=2"],
            3,
            "replicas is of engine=ray; engine=local has those that hardware.replicas planned",
        ),
        (["serve", "serve.keys=nothing.txt"], 3, "nothing.txt cannot be read: No such file"),
        (["serve", "serve.host=203.0.113.7"], 2, "203.0.113.7:8000 cannot be listened on"),
        (["serve", "plan_file=nothing.json"], 5, "there is no plan file nothing.json"),
        (["serve.port=1"], 2, "serve.port=1 is of the command serve"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_sentence(here: Run, arguments: list[str], code: int, says: str) -> None:
    ended = here(*arguments)
    assert ended.returncode == code, ended.stderr
    assert says in " ".join(ended.stderr.split())


def test_a_port_that_is_taken_is_named() -> None:
    taken = server.listen("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(UsageError, match=f"127.0.0.1:{port} cannot be listened on: Address already in use") as caught:
        server.listen("127.0.0.1", port)
    assert caught.value.hint == "serve.port=0 takes a free one"
    taken.close()


def test_keys_are_words_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\n  two \n")
    assert command._keys(str(tmp_path / "keys")) == ("one", "two")
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(Exception, match="holds no key"):
        command._keys(str(tmp_path / "keys"))


def test_help_shows_the_keys_and_how_to_ask(here: Run) -> None:
    shown = here("serve", "--help")
    assert shown.returncode == 0
    assert "sana-deploy serve plan_file=plan.json" in shown.stdout
    assert "max_body: 32MiB" in shown.stdout
    assert "serve plan_file=" in here("--help").stdout


def test_without_the_extra_it_is_named(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name in ("uvicorn", "fastapi") else find_spec(name))
    ended = here("serve")
    assert ended.returncode == 2
    said = " ".join(ended.stderr.split())
    assert "fastapi, uvicorn are needed to serve and are not installed" in said
    assert 'pip install "sana-deploy[serve]"' in said


def test_without_ray_serve_its_extra_is_named(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = ("watchfiles", "aiohttp_cors")  # ray alone comes with another extra
    monkeypatch.setattr(command, "find_spec", lambda name: None if name in hidden else True)
    ended = here("serve", "serve.engine=ray")
    assert ended.returncode == 2
    said = " ".join(ended.stderr.split())
    assert "ray[serve] is needed to serve and is not installed" in said
    assert 'pip install "sana-deploy[serve-ray]"' in said
