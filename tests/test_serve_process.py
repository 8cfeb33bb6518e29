"""The process that serves: the command, signals, exit codes, and the real tiny pipeline from end to end."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from processes import Process, descendants, replicas_of, started
from serving import running
from sleeping import Sleeping

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.serving import Serving
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import UsageError
from sana_deploy.plan.artifact import Plan, ResolvedPlan
from sana_deploy.serve import command, engines, server
from sana_deploy.serve.assembly import bearer_keys
from sana_deploy.serve.engine import Content, Preview, QueueFullError, Settings
from sana_deploy.serve.pictures import no_control_image
from sana_deploy.serve.replica import PipelineReplica

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
    def __init__(self, resolved, overlap=True):
        super().__init__({step})

    def load(self):
        {load}

replica.PipelineReplica = Replica
machine.probe_torch = machine.probe  # without torch, which takes seconds to import
sys.argv = ["sana-deploy", "serve", "precision=fp32", "serve.port=0", *sys.argv[1:]]
__main__.command()
"""


@contextmanager
def sleeping(folder: Path, *overrides: str, step: float = 0.02, load: str = "pass") -> Iterator[Process]:
    with started([sys.executable, "-c", SLEEPING.format(step=step, load=load), *overrides], folder) as one:
        yield one


def post(url: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/images/generations", json={**BODY, **body}, timeout=120)


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
        def __init__(self, one: ResolvedPlan, overlap: bool = True) -> None:
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
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_command_outlives_out_of_memory_a_killed_replica_and_a_full_queue_and_loses_nothing(
    engine: str, small: Callable[..., DeploySpec], tiny: Path, tmp_path: Path
) -> None:
    plan = compile_spec(small("precision=fp32", "workload.guidance_scale=1"))
    saved = plan.save(tmp_path / "a plan.json")
    options = ["serve.queue=4", "serve.most_images=4", "serve.most_steps=30", f"serve.engine={engine}"]
    options += ["serve.replicas=2"] * (engine == "ray")
    command = [sys.executable, "-m", "sana_deploy", "serve", f"plan_file={saved}", "serve.port=0", *options]
    with started(command, tmp_path) as one, ThreadPoolExecutor(12) as pool:
        url = one.url()
        assert httpx2.get(f"{url}/plan").text == saved.read_text()
        where = "2 replicas of Ray Serve" if engine == "ray" else "cpu"
        assert f"model tiny, 96x64 px, 2 steps, on {where}" in one.said
        processes = descendants(one.process.pid)
        with little_memory(replicas_of(one.process.pid) or [one.process.pid]):
            answer = post(url, size="3072x3072", steps=1)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "out_of_memory")
        asked = [pool.submit(post, url, size="64x32", steps=30, seed=seed) for seed in range(12)]
        until(lambda: arrived(url) == 13)  # with the one that was too large
        if engine == "ray":
            os.kill(replicas_of(one.process.pid)[0], signal.SIGKILL)
        one.process.send_signal(signal.SIGTERM)
        answers = dict(enumerate(answer.result() for answer in asked))
        assert one.ended() == 0, one.said
        assert one.said.rstrip().endswith("stopped")
    drawn = {seed: pixels(answer) for seed, answer in answers.items() if answer.status_code == 200}
    others = [answer for seed, answer in answers.items() if seed not in drawn]
    assert len(drawn) >= 5
    assert {answer.status_code for answer in others} == {429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in others)
    assert drawn == drawn_here(plan, drawn)
    assert len(set(drawn.values())) == len(drawn)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))


def drawn_here(plan: Plan, seeds: Iterable[int]) -> dict[int, bytes]:
    """What the pipeline draws of these seeds in this process, with one thread, as the processes of services have."""
    replica, threads = PipelineReplica(plan.resolve()), torch.get_num_threads()
    replica.load()
    settings = Settings(height=32, width=64, steps=30, guidance_scale=1.0, conditioning_scale=0.0)
    contents = [Content("x", "", seed, no_control_image(settings.workload())) for seed in seeds]
    torch.set_num_threads(1)
    try:
        made = [replica.draw(settings, [content], Unwatched()) for content in contents]
    finally:
        torch.set_num_threads(threads)
    return {content.seed: one.pictures[0].tobytes() for content, one in zip(contents, made, strict=True)}


@contextmanager
def little_memory(processes: list[int]) -> Iterator[None]:
    """Let processes have 220 MiB more than they have now: a large picture has pieces of half of that."""
    for pid in processes:
        now = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (now + 220 * 1024**2, resource.RLIM_INFINITY))
    yield
    for pid in processes:
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Unwatched:
    """Whoever draws is told to go on."""

    shown: frozenset[int] = frozenset()

    def __call__(self, done: int, of: int, preview: Preview) -> None:
        pass

    def check(self) -> None:
        pass


def arrived(url: str) -> int:
    """Requests for pictures that were answered, wait or are drawn."""
    counted = r'^sana_(?:requests_total{code="\d+",route="/v1/images/generations"}|queue_length|working) (\S+)$'
    return int(sum(map(float, re.findall(counted, httpx2.get(f"{url}/metrics").text, re.MULTILINE))))


def pixels(answer: httpx2.Response) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).tobytes()


def until(done: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


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
    port = taken.getsockname()[1]
    with pytest.raises(UsageError, match=f"127.0.0.1:{port} cannot be listened on: Address already in use") as caught:
        server.listen("127.0.0.1", port)
    assert caught.value.hint == "serve.port=0 takes a free one"
    taken.close()


def test_keys_are_words_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\n  two \n")
    assert bearer_keys(str(tmp_path / "keys")) == ("one", "two")
    assert bearer_keys(None) == ()
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(Exception, match="holds no key"):
        bearer_keys(str(tmp_path / "keys"))


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
