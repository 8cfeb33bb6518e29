"""Load on an images API: latencies, throughput and every code, in a closed loop or at a rate of arrivals.

    python benchmarks/serve.py --url http://127.0.0.1:8000 --requests 500 --concurrency 32 --steps 20 --size 512x512
    python benchmarks/serve.py --url http://127.0.0.1:8000 --requests 200 --rate 4      (open loop, Poisson arrivals)
    python benchmarks/serve.py --engine ray --requests 500 --concurrency 32 --kill      (starts the tiny model here)
    python benchmarks/serve.py --engine local --no-op --concurrency 1                   (what the service itself takes)
    python benchmarks/serve.py --bare --concurrency 1                                   (what HTTP itself takes)

Prints one JSON document. Every request ends in a line of `codes`: what was answered, or `lost` where nothing was.
`--engine` starts the command `serve` with the tiny model on the CPU and ends it by SIGTERM after it. With `--kill`
a replica of Ray is killed after a third of it. `pictures` is a digest of the pixels by seed: the same pictures have the
same one, on either engine. `--no-op` starts a service here whose replica draws nothing: its latency is what HTTP, the
queue, checks and PNG take. `--bare` starts an application that answers each request with the same bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI, Request
from PIL import Image

PATH = "/v1/images/generations"
TESTS = Path(__file__).parent.parent / "tests"
TINY = ("precision=fp32", "workload.height=64", "workload.width=64", "workload.steps=2", "serve.port=0")


@dataclass
class Load:
    """What is sent, and what came of it. `after` is called once so many requests have ended."""

    url: str
    body: dict[str, Any]
    retries: int
    vary: bool = False
    """Whether each request has a prompt of its own."""
    after: tuple[int, Callable[[], None]] | None = None
    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)
    pixels: dict[int, str] = field(default_factory=dict)
    retried: int = 0

    async def ask(self, client: httpx2.AsyncClient, seed: int) -> None:
        """Send one request and note what comes."""
        await self._ask(client, seed)
        if self.after and sum(self.codes.values()) == self.after[0]:
            self.after[1]()

    async def _ask(self, client: httpx2.AsyncClient, seed: int) -> None:
        """One that is refused for a full queue comes again when it was told to."""
        began = time.perf_counter()
        body = {**self.body, "seed": seed}
        body["prompt"] += f", number {seed}" if self.vary else ""
        for attempt in range(self.retries + 1):
            try:
                answer = await client.post(f"{self.url}{PATH}", json=body)
            except httpx2.HTTPError as problem:
                self.codes[f"lost: {type(problem).__name__}"] += 1
                return
            if answer.status_code != 429 or attempt == self.retries:
                break
            self.retried += 1
            await asyncio.sleep(float(answer.headers.get("retry-after", "1")))
        self.codes[str(answer.status_code)] += 1
        if answer.status_code == 200:
            said = answer.json()
            self.seconds.append(time.perf_counter() - began)
            self.queued.append(float(said["sana_deploy"]["queue_seconds"]))
            for drawn, one in zip(said["sana_deploy"]["seeds"], said["data"], strict=True):
                picture = Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))
                self.pixels[drawn] = hashlib.sha256(picture.tobytes()).hexdigest()


async def closed_loop(load: Load, requests: int, concurrency: int) -> None:
    """Keep `concurrency` requests in flight until `requests` have ended."""
    seeds = iter(range(requests))
    async with _client(concurrency) as client:

        async def worker() -> None:
            for seed in seeds:
                await load.ask(client, seed)

        await asyncio.gather(*(worker() for _ in range(concurrency)))


async def open_loop(load: Load, requests: int, rate: float) -> None:
    """Send requests at random times, `rate` a second on average, whatever became of those before."""
    arrivals, asked = random.Random(0), []
    async with _client(requests) as client:
        for seed in range(requests):
            asked.append(asyncio.create_task(load.ask(client, seed)))
            await asyncio.sleep(arrivals.expovariate(rate))
        await asyncio.gather(*asked)


def _client(connections: int) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx2.AsyncClient(timeout=3600, limits=limits)


def summary(load: Load, requests: int, seconds: float) -> dict[str, Any]:
    """What came of the load, in seconds and pictures a second."""
    done = sorted(load.seconds)
    return {
        "requests": requests,
        "codes": dict(load.codes),
        "lost": requests - sum(count for code, count in load.codes.items() if not code.startswith("lost")),
        "retried_after_429": load.retried,
        "different_pictures": len(set(load.pixels.values())),
        "pictures": hashlib.sha256(json.dumps(sorted(load.pixels.items())).encode()).hexdigest()[:16],
        "seconds": round(seconds, 3),
        "images_per_second": round(len(load.pixels) / seconds, 3),
        "latency": {name: round(_quantile(done, share), 4) for name, share in _QUANTILES.items()} if done else {},
        "mean_latency": round(statistics.fmean(done), 4) if done else None,
        "mean_queue_seconds": round(statistics.fmean(load.queued), 4) if load.queued else None,
    }


_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measured(options: argparse.Namespace, url: str, kill: Callable[[], None] | None = None) -> dict[str, Any]:
    """Send the load that the options ask for; `kill` is called after a third of it."""
    body = {"prompt": options.prompt, "size": options.size, "n": options.n}
    body |= {} if options.steps is None else {"steps": options.steps}
    load = Load(url, body, options.retries, options.vary, (options.requests // 3, kill) if kill else None)
    began = time.perf_counter()
    if options.rate:
        asyncio.run(open_loop(load, options.requests, options.rate))
    else:
        asyncio.run(closed_loop(load, options.requests, options.concurrency))
    return summary(load, options.requests, time.perf_counter() - began) | {"per_request": options.n}


def served(options: argparse.Namespace) -> dict[str, Any]:
    """The load on the command `serve` with the tiny model, in a process of its own."""
    from processes import replicas_of, started

    command = [sys.executable, "-m", "sana_deploy", "serve", *TINY, f"serve.engine={options.engine}", *options.override]
    if options.engine == "ray":
        command.append(f"serve.replicas={options.replicas}")
    with tempfile.TemporaryDirectory() as folder, started(command, Path(folder)) as one:
        began = time.perf_counter()
        url = one.url()
        ready = time.perf_counter() - began

        def kill() -> None:
            while f"sana_working {float(options.replicas)}" not in httpx2.get(f"{url}/metrics").text:
                time.sleep(0.001)  # the load stands still meanwhile, and replicas draw what has arrived
            os.kill(replicas_of(one.process.pid)[0], signal.SIGKILL)

        result = measured(options, url, kill if options.kill else None)
        (again,) = re.findall(r"^sana_retried_total (\S+)", httpx2.get(f"{url}/metrics").text, re.MULTILINE)
        began = time.perf_counter()
        one.process.send_signal(signal.SIGTERM)
        code = one.ended(120)
        ended = time.perf_counter() - began
    seconds = {"ready_seconds": round(ready, 1), "end_seconds": round(ended, 1)}
    return {"engine": options.engine, **result, **seconds, "drawn_again": float(again), "exit_code": code}


def no_op(options: argparse.Namespace) -> dict[str, Any]:
    """The load on a service whose replicas draw nothing."""
    import sleeping
    from serving import running, two_small_gpus

    replicas: list[Any] = [sleeping.Sleeping(0) for _ in range(options.replicas)]
    if options.engine == "ray":
        from sana_deploy.api import compile_spec
        from sana_deploy.declare.compose import compose_spec
        from sana_deploy.serve.engines import prepare_ray

        prepare_ray()
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        from sana_deploy.serve.ray_cluster import Cluster

        plan = compile_spec(compose_spec(["precision=fp32"]))
        replicas = [Cluster(plan, options.replicas, drain=5, make=sleeping.at_once)]
    with running(two_small_gpus(), *replicas, queue=4096, timeout=3600.0) as service:
        return {"engine": options.engine, "no_op": True, **measured(options, service.url)}


@contextlib.contextmanager
def bare_app(size: str) -> Iterator[str]:
    """An application on the same server that reads a request's JSON and answers with one picture: always the same."""
    import uvicorn

    from sana_deploy.serve.server import listen, url_of

    app, buffer = FastAPI(), io.BytesIO()
    Image.new("RGB", (int(size.partition("x")[0]), int(size.partition("x")[2]))).save(buffer, "PNG")
    content = base64.b64encode(buffer.getvalue()).decode()

    @app.post(PATH)
    async def draw(request: Request) -> dict[str, Any]:
        seed = (await request.json())["seed"]
        return {"data": [{"b64_json": content}], "sana_deploy": {"seeds": [seed], "queue_seconds": 0.0}}

    opened = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="h11"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[opened])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield url_of(opened)
    server.should_exit = True
    thread.join()


def main() -> None:
    """Run the load generator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=8, help="requests in flight, in a closed loop")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second, in an open loop")
    parser.add_argument("--prompt", default="a small lighthouse on a rocky shore at dusk")
    parser.add_argument("--vary", action="store_true", help="give each request a prompt of its own")
    parser.add_argument("--size", default="auto")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--n", type=int, default=1)
    parser.add_argument("--retries", type=int, default=20, help="how often a request that was answered 429 comes again")
    parser.add_argument("--engine", choices=("local", "ray"), help="start a service here")
    parser.add_argument("--replicas", type=int, default=2, help="of ray, and of --no-op")
    parser.add_argument("--kill", action="store_true", help="kill a replica of ray after a third of the requests")
    parser.add_argument("--override", action="append", default=[], help="of the service that is started, KEY=VALUE")
    parser.add_argument("--no-op", action="store_true", help="the service that is started draws nothing")
    parser.add_argument("--bare", action="store_true", help="start an application that does nothing else than answer")
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    if options.bare:
        with bare_app("64x64" if options.size == "auto" else options.size) as url:
            result = {"bare": True, **measured(options, url)}
    elif options.no_op:
        result = no_op(options)
    else:
        result = served(options) if options.engine else measured(options, options.url)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
