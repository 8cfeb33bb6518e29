"""What Prometheus reads of a service: requests, the queue, seconds, pictures, batches, GPU memory beside the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ..plan.artifact import ResolvedPlan
from .engine import Made, Observer, Standing

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
_BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics(Observer):
    """The metrics of one service, in a registry of its own.

    Args:
        resolved: the plan, for the memory that it expects of each device.
        overlaps: whether stages of several requests overlap where the plan says so.
    """

    def __init__(self, resolved: ResolvedPlan, overlaps: bool = False) -> None:
        self.registry = CollectorRegistry()
        here = self.registry
        self.requests = Counter("sana_requests", "Answers by route and status.", ["route", "code"], registry=here)
        self.request_seconds = Histogram(
            "sana_request_seconds", "Seconds from a request's head to the end of its answer.", ["route"],
            buckets=_SECONDS, registry=here,
        )  # fmt: skip
        self.queue_seconds = Histogram(
            "sana_queue_seconds", "Seconds that a picture waited.", buckets=_SECONDS, registry=here
        )
        self.phase_seconds = Histogram(
            "sana_phase_seconds", "Seconds of a batch by phase; generate is all of them.", ["phase"],
            buckets=_SECONDS, registry=here,
        )  # fmt: skip
        self.pictures = Counter("sana_images", "Pictures drawn.", registry=here)
        self.batches = Histogram("sana_batch_size", "Pictures drawn at once.", buckets=_BATCHES, registry=here)
        self.gone = Counter("sana_cancelled", "Pictures whose client left before they were done.", registry=here)
        self.again = Counter(
            "sana_retried", "Pictures drawn again after a failure of their batch or replica.", registry=here
        )
        self.peak = Gauge(
            "sana_gpu_peak_bytes",
            "Most bytes of tensors on a GPU in the last batch, or so far where stages overlap.",
            ["device"],
            registry=here,
        )
        planned = Gauge(
            "sana_gpu_planned_bytes", "Bytes of tensors that the plan expects there at most.", ["device"], registry=here
        )
        for replica in resolved.each():
            overlap = replica.plan.overlap if overlaps else None
            waiting = {use.slot: use.waiting_bytes for use in overlap.slots} if overlap else {}
            for slot in replica.plan.slots:
                if device := replica.slot_devices.get(slot.index):
                    own = slot.weights_bytes + slot.activation_bytes
                    planned.labels(device).set(own + waiting.get(slot.index, 0))

    def watch(self, standing: Callable[[], Standing]) -> None:
        """Read the engine's standing whenever the metrics are read."""
        self.registry.register(_Standing(standing))

    def began(self, waited: Sequence[float]) -> None:
        """See `Observer`."""
        self.batches.observe(len(waited))
        for seconds in waited:
            self.queue_seconds.observe(seconds)

    def made(self, made: Made) -> None:
        """See `Observer`."""
        self.pictures.inc(len(made.pictures))
        for phase, seconds in made.seconds.items():
            self.phase_seconds.labels(phase).observe(seconds)
        for device, peak in made.peak_bytes.items():
            self.peak.labels(device).set(peak)

    def cancelled(self, pictures: int) -> None:
        """See `Observer`."""
        self.gone.inc(pictures)

    def retried(self, pictures: int) -> None:
        """See `Observer`."""
        self.again.inc(pictures)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """An answer has ended; `route` is a path of ours, or `other`."""
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Standing(Collector):
    """The engine's standing as gauges."""

    def __init__(self, standing: Callable[[], Standing]) -> None:
        self.standing = standing

    def collect(self) -> Sequence[GaugeMetricFamily]:
        """Read it now."""
        now = self.standing()
        return [
            GaugeMetricFamily("sana_queue_length", "Pictures that wait.", value=now.waiting),
            GaugeMetricFamily("sana_working", "Pictures that are drawn now.", value=now.working),
            GaugeMetricFamily("sana_replicas_ready", "Replicas that can draw.", value=now.ready),
            GaugeMetricFamily("sana_replicas", "Replicas in all.", value=now.replicas),
        ]
