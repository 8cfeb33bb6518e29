"""A deployment on Ray Serve that tests share: two replicas that sleep, in processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray import serve
from sleeping import asleep

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.serve.ray_cluster import Cluster

TESTS = Path(__file__).parent


class Shared(Cluster):
    """Sleeping replicas that outlive the engines over them."""

    def __init__(self) -> None:
        plan = compile_spec(compose_spec(["precision=fp32"]))
        super().__init__(plan, 2, drain=5, make=asleep)
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, since sockets are in it
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch:  # where processes of Ray find what tests import
            patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
            ray.init(
                address="local",
                num_cpus=8,
                object_store_memory=256 * 1024**2,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"worker_process_setup_hook": "sleeping.without_torch"},
                _temp_dir=self.folder,
            )
        signal.signal(signal.SIGTERM, handler)  # Ray takes it
        super().deploy(120, lambda: False)

    def end(self) -> None:
        """End the replicas, and Ray."""
        super().remove()
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def seen_as(self, replicas: int) -> Seen:
        """The deployment for an engine that has so many drawings at a time."""
        return Seen(self, replicas)


class Seen(Cluster):
    """A deployment that is there already, and stays."""

    def __init__(self, shared: Shared, replicas: int) -> None:
        super().__init__(shared.plan, replicas, drain=5)
        self.handle = shared.handle

    def deploy(self, seconds: float, stopped: Callable[[], bool]) -> None:
        """It is there."""

    def remove(self) -> None:
        """It stays."""
