"""A plan as a `RayService` of KubeRay: a pod for each replica, with the GPUs of its slots. Imports no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._units import MIB, parse_bytes
from ..declare.serving import Serving
from ..plan.artifact import Plan
from .ray_options import Scaling

NAME = "sana-deploy"
PORT = 8000
"""Of Ray's proxy: KubeRay's service and its probes expect it."""
CACHE = "/cache"
"""Where the image keeps what it downloads, generates and compiles."""
GROUP = 10001
"""Of the image's user, which writes into the cache."""
KEYS_SECRET = f"{NAME}-keys"
_READY = {"httpGet": {"path": "/ready", "port": PORT}, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3}
"""The probe of pods that draw: it answers once the API behind Ray's proxy draws. The head keeps KubeRay's own probe,
since KubeRay hands it the application once it is ready."""
_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_HEAD_LIMITS = {"cpu": "2", "memory": "8Gi"}
_HEAD_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "serve": PORT}


def folder_of(plan: Plan) -> Path | None:
    """The folder that holds the plan's checkpoint; None where it is generated or comes from the hub."""
    source = getattr(plan.spec.model, "source", None)
    folder = Path(source) if source else None
    return folder if folder and (folder.is_absolute() or folder.expanduser().is_dir()) else None


def manifest(plan: Plan, options: Serving, config: str, ray_version: str) -> dict[str, Any]:
    """The manifest, of `ray.io/v1`.

    Args:
        config: the config of Ray Serve, as YAML.
        ray_version: of the image.
    """
    one, scaling = plan.each()[0], Scaling.of(plan, options)
    gpus = len(one.slots)
    about = {f"{NAME}/plan": plan.digest, f"{NAME}/gpus": ", ".join(slot.gpu for slot in one.slots) or "none"}
    limits = {"cpu": str(options.kuberay.cpus), "memory": quantity(options.kuberay.memory)}
    if gpus:
        limits["nvidia.com/gpu"] = str(gpus)
    ports = [{"name": name, "containerPort": number} for name, number in _HEAD_PORTS.items()]
    head = pod_template(plan, options, {"name": "ray-head", "ports": ports, "resources": resources_of(_HEAD_LIMITS)})
    worker = {"name": "ray-worker", "resources": resources_of(limits), "readinessProbe": _READY}
    group = {
        "groupName": "replicas",
        "replicas": scaling.first,
        "minReplicas": scaling.least,
        "maxReplicas": scaling.most,
        "rayStartParams": {},
        "template": pod_template(plan, options, worker, options.drain),
    }
    cluster: dict[str, Any] = {"rayVersion": ray_version, "authOptions": {"mode": "token"}}  # for Ray's own ports
    if scaling.autoscaling_config:
        cluster["enableInTreeAutoscaling"] = True
    cluster["headGroupSpec"] = {"rayStartParams": {"dashboard-host": "0.0.0.0"}, "template": head}
    cluster["workerGroupSpecs"] = [group]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME, "annotations": about},
        "spec": {"serveConfigV2": config, "excludeHeadPodFromServeSvc": True, "rayClusterConfig": cluster},
    }


def quantity(size: str) -> str:
    """A size in Kubernetes' words."""
    return f"{-(-parse_bytes(size) // MIB)}Mi"


def resources_of(limits: Mapping[str, str]) -> dict[str, Any]:
    """What a container gets: no more than it asks for, and no less."""
    return {"limits": dict(limits), "requests": dict(limits)}


def pod_template(plan: Plan, options: Serving, container: Mapping[str, Any], drain: float = 0) -> dict[str, Any]:
    """The template of a pod: our image, not as root, with what the application reads mounted.

    Args:
        drain: seconds that the pod has to end what it draws.
    """
    volumes: list[dict[str, Any]] = [{"name": "cache", "emptyDir": {}}]
    mounts: list[dict[str, Any]] = [{"name": "cache", "mountPath": CACHE}]
    if (folder := folder_of(plan)) and options.kuberay.claim:
        claim = {"claimName": options.kuberay.claim, "readOnly": True}
        volumes.append({"name": "checkpoint", "persistentVolumeClaim": claim})
        mounts.append({"name": "checkpoint", "mountPath": str(folder), "readOnly": True})
    if options.keys:
        volumes.append({"name": "keys", "secret": {"secretName": KEYS_SECRET}})
        mounts.append({"name": "keys", "mountPath": str(Path(options.keys).parent), "readOnly": True})
    ours = {"image": options.kuberay.image, "securityContext": _SECURITY, "volumeMounts": mounts}
    return {
        "spec": {
            "terminationGracePeriodSeconds": max(30, round(drain) + 10),
            "securityContext": {"runAsNonRoot": True, "fsGroup": GROUP},
            "containers": [{"name": container["name"], **ours, **container}],
            "volumes": volumes,
        }
    }
