"""Load on an images API: latencies, throughput and every code, in a closed loop or at a rate of arrivals.

    python benchmarks/serve.py --url http://127.0.0.1:8000 --requests 500 --concurrency 32 --steps 20 --size 512x512
    python benchmarks/serve.py --url http://127.0.0.1:8000 --requests 200 --rate 4      (open loop, Poisson arrivals)
    python benchmarks/serve.py --no-op                                                  (what the service itself takes)

Prints one JSON document. Every request ends in a line of `codes`: what was answered, or `lost` where nothing was.
`--no-op` starts a service here whose replica draws nothing; its latency is what HTTP, queue, checks and PNG take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

PATH = "/v1/images/generations"


@dataclass
class Load:
    """What is sent, and what came of it."""

    url: str
    body: dict[str, Any]
    retries: int
    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)
    seeds: set[int] = field(default_factory=set)
    retried: int = 0

    async def ask(self, client: httpx2.AsyncClient, seed: int) -> None:
        """Send one request; one that is refused for a full queue comes again when it was told to."""
        began = time.perf_counter()
        for attempt in range(self.retries + 1):
            try:
                answer = await client.post(f"{self.url}{PATH}", json={**self.body, "seed": seed})
            except httpx2.HTTPError as problem:
                self.codes[f"lost: {type(problem).__name__}"] += 1
                return
            if answer.status_code != 429 or attempt == self.retries:
                break
            self.retried += 1
            await asyncio.sleep(float(answer.headers.get("retry-after", "1")))
        self.codes[str(answer.status_code)] += 1
        if answer.status_code == 200:
            own = answer.json().get("sana_deploy", {})
            self.seconds.append(time.perf_counter() - began)
            self.queued.append(float(own.get("queue_seconds", 0.0)))
            self.seeds.update(own.get("seeds", [seed]))


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
        "different_pictures": len(load.seeds),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(load.seeds) / seconds, 3),
        "latency": {name: round(_quantile(done, share), 4) for name, share in _QUANTILES.items()} if done else {},
        "mean_latency": round(statistics.fmean(done), 4) if done else None,
        "mean_queue_seconds": round(statistics.fmean(load.queued), 4) if load.queued else None,
    }


_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measured(options: argparse.Namespace, url: str) -> dict[str, Any]:
    """Send the load that the options ask for."""
    body = {"prompt": options.prompt, "size": options.size, "n": options.n}
    body |= {} if options.steps is None else {"steps": options.steps}
    load = Load(url, body, options.retries)
    began = time.perf_counter()
    if options.rate:
        asyncio.run(open_loop(load, options.requests, options.rate))
    else:
        asyncio.run(closed_loop(load, options.requests, options.concurrency))
    return summary(load, options.requests, time.perf_counter() - began) | {"per_request": options.n}


def no_op(options: argparse.Namespace) -> dict[str, Any]:
    """The same load on a service whose replica draws nothing."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from serving import running, two_small_gpus
    from sleeping import Sleeping

    with running(two_small_gpus(), Sleeping(0), queue=4096, timeout=3600.0) as service:
        return measured(options, service.url)


def main() -> None:
    """Run the load generator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=8, help="requests in flight, in a closed loop")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second, in an open loop")
    parser.add_argument("--prompt", default="a small lighthouse on a rocky shore at dusk")
    parser.add_argument("--size", default="auto")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--n", type=int, default=1)
    parser.add_argument("--retries", type=int, default=20, help="how often a request that was answered 429 comes again")
    parser.add_argument("--no-op", action="store_true", help="start a service here that draws nothing")
    options = parser.parse_args()
    result = no_op(options) if options.no_op else measured(options, options.url)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
