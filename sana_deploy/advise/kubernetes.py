"""A plan as a Deployment and a Service of Kubernetes; GPUs by a resource claim with their memory, or by limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._units import MIB, parse_bytes
from ..declare.serving import Serving
from ..plan.artifact import Plan
from ..serve.kuberay import NAME, PORT, pod_template

_PLAN_FOLDER = "/plan"
_DRIVER = "gpu.nvidia.com"
"""The device class, and the domain of attributes, of NVIDIA's DRA driver."""
_MEMORY_LABEL, _MAJOR_LABEL = "nvidia.com/gpu.memory", "nvidia.com/gpu.compute.major"
"""MiB and compute capability of a node's GPUs, set by NVIDIA's GPU feature discovery."""
_PERIOD = 5


def manifests(
    plan: Plan, options: Serving, host_bytes: int, served: Sequence[str], gpus_by: str
) -> list[dict[str, Any]]:
    """The documents: the plan in a ConfigMap, a claim's template where GPUs are claimed, the Deployment, the Service.

    Args:
        options: of the group `serve`.
        host_bytes: host memory that the service takes.
        served: overrides of the group `serve`.
        gpus_by: `claim` or `limits`.
    """
    labels = {"app.kubernetes.io/name": NAME}
    claimed = gpus_by == "claim" and bool(plan.all_slots)
    about = {f"{NAME}/plan": plan.digest, f"{NAME}/gpus": ", ".join(slot.gpu for slot in plan.all_slots) or "none"}
    template = _template(plan, options, host_bytes, served, gpus_by)
    template["metadata"] = {"labels": labels, "annotations": about}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{NAME}-plan", "labels": labels},
              "data": {"plan.json": plan.to_json()}}  # fmt: skip
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME, "labels": labels, "annotations": about},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # a second pod would wait for the GPUs of the first one
            "selector": {"matchLabels": labels},
            "template": template,
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME, "labels": labels},
        "spec": {"selector": labels, "ports": [{"name": "http", "port": PORT, "targetPort": PORT}]},
    }
    return [config, *([_claim(plan)] if claimed else []), deployment, service]


def _template(plan: Plan, options: Serving, host_bytes: int, served: Sequence[str], gpus_by: str) -> dict[str, Any]:
    """The template of the pod, without its labels."""
    memory = max(host_bytes, parse_bytes(options.kuberay.memory))
    requests: dict[str, str] = {"cpu": str(options.kuberay.cpus), "memory": _mebibytes(host_bytes)}
    limits: dict[str, str] = {"memory": _mebibytes(memory)}
    resources: dict[str, Any] = {"requests": requests, "limits": limits}
    count = len(plan.all_slots)
    if count and gpus_by == "limits":
        limits["nvidia.com/gpu"] = str(count)
    elif count:
        resources["claims"] = [{"name": "gpus"}]
    own = [one for one in served if not one.startswith(("serve.port=", "serve.host="))]
    container = {
        "name": NAME,
        "command": ["sana-deploy", "serve"],
        "args": [f"plan_file={_PLAN_FOLDER}/plan.json", "serve.host=0.0.0.0", f"serve.port={PORT}", *own],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": resources,
        "startupProbe": {**_probe("/ready"), "failureThreshold": max(1, round(options.startup / _PERIOD))},
        "readinessProbe": _probe("/ready"),
        "livenessProbe": {**_probe("/health"), "failureThreshold": 6},
    }
    template: dict[str, Any] = pod_template(plan, options, container, options.drain)
    pod = template["spec"]
    pod["volumes"].append({"name": "plan", "configMap": {"name": f"{NAME}-plan"}})
    pod["containers"][0]["volumeMounts"].append({"name": "plan", "mountPath": _PLAN_FOLDER, "readOnly": True})
    if count and gpus_by == "limits":
        pod["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": _nodes(plan)}}
    elif count:
        pod["resourceClaims"] = [{"name": "gpus", "resourceClaimTemplateName": f"{NAME}-gpus"}]
    return template


def _claim(plan: Plan) -> dict[str, Any]:
    """The template of a claim for as many GPUs as the plan has slots, each with what the fullest one needs."""
    major, minor = _capability(plan)
    new = f"device.attributes['{_DRIVER}'].cudaComputeCapability.compareTo(semver('{major}.{minor}.0')) >= 0"
    enough = f"device.capacity['{_DRIVER}'].memory.compareTo(quantity('{_needed_mib(plan)}Mi')) >= 0"
    exactly = {
        "deviceClassName": _DRIVER,
        "allocationMode": "ExactCount",
        "count": len(plan.all_slots),
        "selectors": [{"cel": {"expression": one}} for one in (enough, new)],
    }
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {"name": f"{NAME}-gpus"},
        "spec": {"spec": {"devices": {"requests": [{"name": "gpus", "exactly": exactly}]}}},
    }


def _nodes(plan: Plan) -> dict[str, Any]:
    """Nodes whose GPUs have the memory that the fullest slot needs; the plan itself refuses what is too old for it."""
    least = {_MEMORY_LABEL: _needed_mib(plan), _MAJOR_LABEL: _capability(plan)[0]}
    labels = [{"key": key, "operator": "Gt", "values": [str(value - 1)]} for key, value in least.items()]
    return {"nodeSelectorTerms": [{"matchExpressions": labels}]}


def _capability(plan: Plan) -> tuple[int, int]:
    """The compute capability of the newest GPU that was planned for: an older one is refused."""
    major, minor = max(slot.compute_capability for slot in plan.all_slots)
    return major, minor


def _needed_mib(plan: Plan) -> int:
    """Memory of a GPU that holds the fullest slot, in MiB."""
    return max(-(-(slot.peak_bytes + slot.others_bytes) // MIB) for slot in plan.all_slots)


def _mebibytes(count: int) -> str:
    return f"{-(-count // MIB)}Mi"


def _probe(path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": PORT}, "periodSeconds": _PERIOD, "timeoutSeconds": 5}
