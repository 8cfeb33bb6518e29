"""`advise --export`: tasks that SkyPilot reads, objects that Kubernetes has, KubeRay as `serve` writes it."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kubernetes import client

from sana_deploy._units import MIB, parse_bytes
from sana_deploy.advise.prices import read_prices
from sana_deploy.advise.skypilot import task
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.serving import Serving
from sana_deploy.plan.artifact import Plan

Run = Callable[..., subprocess.CompletedProcess[str]]
TABLE = """\
provider,instance,gpu,gpu_count,gpu_memory_gb,usd_per_hour,region,spot,date,source
runpod,2x L40S,L40S,2,48,2.18,,no,2026-09-25,https://example.org/prices
aws,g6.xlarge,L4,1,24,0.8048,us-east-1,no,2026-01-19,https://example.org/prices
"""
GIVEN = ("model=sana_1600m_controlnet", "model.source=owner/name", "advise.prices=prices.csv")
_TEXT = {"type": "string"}
SKYPILOT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["resources", "run"],
    "properties": {
        "name": _TEXT,
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "infra": {"type": "string", "pattern": r"^[a-z]+(/[^/]+){0,2}$"},
                "accelerators": {"type": "string", "pattern": r"^[\w-]+:[1-9]\d*$"},
                "memory": {"type": "string", "pattern": r"^\d+\+$"},
                "use_spot": {"type": "boolean"},
                "ports": {"type": "integer"},
            },
        },
        "file_mounts": {"type": "object", "additionalProperties": _TEXT},
        "service": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "readiness_probe": {
                    "type": "object",
                    "required": ["path"],
                    "additionalProperties": False,
                    "properties": {"path": _TEXT, "initial_delay_seconds": {"type": "number"}},
                },
                "replicas": {"type": "integer"},
            },
        },
        "setup": _TEXT,
        "run": _TEXT,
    },
}
"""What SkyPilot 0.14.1's own schema says of the fields that we write, with the forms that its documents give for them.
SkyPilot itself cannot be installed here: it needs an older uvicorn than the service does."""


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.csv"
    path.write_text(TABLE, encoding="utf-8")
    return path


def exported(here: Run, folder: Path, kind: str, *overrides: str) -> list[dict[str, Any]]:
    ended = here("advise", "--export", kind, "out.yaml", *GIVEN, *overrides)
    assert ended.returncode == 0, ended.stderr
    assert "written: out.yaml" in ended.stderr
    text = (folder / "out.yaml").read_text(encoding="utf-8")
    assert "USD per hour, price of 2026-" in text.splitlines()[1]
    return list(yaml.safe_load_all(text))


def known_to_kubernetes(document: dict[str, Any]) -> Any:
    """An object as Kubernetes' own client reads it; a field that the client does not know, or misses, is a fault."""
    api = client.ApiClient()
    read = api.deserialize(json.dumps(document), f"V1{document['kind']}", "application/json")
    assert api.sanitize_for_serialization(read) == document
    return read


def test_a_task_for_skypilot_rents_such_gpus_and_serves_that_plan(here: Run, prices: Path) -> None:
    (read,) = exported(here, prices.parent, "skypilot", "advise.goal=seconds<=3", "serve.queue=20", "serve.port=8123")
    jsonschema.validate(read, SKYPILOT)
    wanted = read["resources"]
    assert (wanted["infra"], wanted["accelerators"], wanted["ports"]) == ("runpod", "L40S:2", 8123)
    command = shlex.split(read["run"])
    assert command[:3] == ["sana-deploy", "serve", "serve.host=0.0.0.0"]
    assert {"serve.queue=20", "serve.port=8123", "hardware.objective=throughput"} <= {*command}
    overrides = [one for one in command[3:] if not one.startswith("serve.")]
    there = compile_spec(compose_spec([*overrides, "machine=virtual", "machine.gpus=2xl40s"]))
    assert len(there.replicas) == 1
    weights = sum(part.weights_bytes for part in there.components.values())
    assert weights < int(wanted["memory"].rstrip("+")) * 10**9 < 2 * weights
    assert read["service"]["readiness_probe"]["path"] == "/ready"


def test_a_task_names_the_region_of_its_price_mounts_a_folder_and_leaves_unknown_providers_out(
    here: Run, prices: Path, tmp_path: Path
) -> None:
    (read,) = exported(here, prices.parent, "skypilot", "advise.goal=budget<=1", "model.source=/models/sana")
    jsonschema.validate(read, SKYPILOT)
    assert read["resources"]["infra"] == "aws/us-east-1"
    assert read["file_mounts"] == {"/models/sana": "/models/sana"}
    (tmp_path / "out.yaml").unlink()
    prices.write_text(TABLE.replace("aws,", "cellar,"), encoding="utf-8")
    (read,) = exported(here, prices.parent, "skypilot", "advise.goal=budget<=1")
    assert "infra" not in read["resources"]


def plan_of(documents: list[dict[str, Any]]) -> Plan:
    return Plan.from_values(json.loads(documents[0]["data"]["plan.json"]), "the ConfigMap")


def test_kubernetes_objects_are_known_to_its_own_client_and_hold_the_plan(here: Run, prices: Path) -> None:
    documents = exported(here, prices.parent, "kubernetes", "advise.goal=seconds<=3", "serve.queue=20")
    config, claim, deployment, service = map(known_to_kubernetes, documents)
    plan = plan_of(documents)
    assert len(plan.all_slots) == 2
    pod = deployment.spec.template.spec
    (container,) = pod.containers
    assert container.args[0] == f"plan_file={container.volume_mounts[1].mount_path}/plan.json"
    assert "serve.queue=20" in container.args
    assert pod.volumes[1].config_map.name == config.metadata.name
    weights = sum(part.weights_bytes for part in plan.components.values())
    assert weights < parse_bytes(container.resources.requests["memory"].replace("Mi", "MiB")) < 2 * weights
    (request,) = claim.spec.spec.devices.requests
    assert (request.exactly.count, request.exactly.device_class_name) == (2, "gpu.nvidia.com")
    needed = max(-(-slot.peak_bytes // MIB) for slot in plan.all_slots)
    assert f"quantity('{needed}Mi')" in request.exactly.selectors[0].cel.expression
    assert "semver('8.9.0')" in request.exactly.selectors[1].cel.expression
    assert pod.resource_claims[0].resource_claim_template_name == claim.metadata.name
    assert container.resources.claims[0].name == pod.resource_claims[0].name == request.name
    assert "nvidia.com/gpu" not in container.resources.limits
    assert service.spec.selector == deployment.spec.selector.match_labels == deployment.spec.template.metadata.labels
    assert service.spec.ports[0].target_port == container.ports[0].container_port == 8000


def test_gpus_are_asked_for_by_limits_where_the_cluster_has_no_claims(here: Run, prices: Path) -> None:
    documents = exported(here, prices.parent, "kubernetes", "advise.goal=seconds<=3", "advise.gpus_by=limits")
    _, deployment, _ = map(known_to_kubernetes, documents)
    pod = deployment.spec.template.spec
    assert pod.containers[0].resources.limits["nvidia.com/gpu"] == "2"
    assert pod.resource_claims is None
    needs = pod.affinity.node_affinity.required_during_scheduling_ignored_during_execution.node_selector_terms[0]
    memory, major = needs.match_expressions
    needed = max(-(-slot.peak_bytes // MIB) for slot in plan_of(documents).all_slots)
    assert (memory.key, memory.operator, memory.values) == ("nvidia.com/gpu.memory", "Gt", [str(needed - 1)])
    assert (major.key, major.values) == ("nvidia.com/gpu.compute.major", ["7"])


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    with pytest.raises(AssertionError):
        known_to_kubernetes({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"port": 1}})


def test_kuberay_is_written_as_serve_writes_it(here: Run, prices: Path) -> None:
    pytest.importorskip("ray", reason="the extra serve-ray is not installed")
    ended = here("advise", "--export", "kuberay", "out.yaml", *GIVEN, "advise.goal=seconds<=3", "serve.kuberay.cpus=6")
    assert (ended.returncode, ended.stderr.count("written: out.yaml")) == (0, 1), ended.stderr
    read = yaml.safe_load((prices.parent / "out.yaml").read_text(encoding="utf-8"))
    (group,) = read["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (read["kind"], group["replicas"], limits["nvidia.com/gpu"], limits["cpu"]) == ("RayService", 2, "1", "6")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--export", "helm", "out.yaml"), "--export takes a kind and a file, got 'helm out.yaml'"),
        (("--export", "skypilot"), "--export takes a kind and a file"),
        (("--export", "skypilot", "prices.csv", *GIVEN), "prices.csv is there already"),
        (("--export", "skypilot", "out.yaml", *GIVEN[::2]), "the model has no weights that could be served"),
        (("--export", "kubernetes", "out.yaml", *GIVEN, "model.source=/models/sana"), "serve.kuberay.claim=NAME"),
        (("--export", "kubernetes", "out.yaml", *GIVEN, "advise.gpus_by=label"), "'label' is not one of claim, limits"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(here: Run, prices: Path, arguments: tuple[str, ...], sentence: str) -> None:
    ended = here("advise", *arguments)
    assert ended.returncode in (2, 3)
    assert sentence in ended.stderr
    assert not (prices.parent / "out.yaml").exists()


def test_gpus_that_skypilot_does_not_tell_apart_have_its_name() -> None:
    pcie = next(one for one in read_prices().prices if one.gpu == "H100-PCIE")
    plan = compile_spec(compose_spec(["model=sana_600m", "machine=virtual", f"machine.gpus={pcie.gpus}"]))
    assert task(plan, pcie, 1, "true", Serving(), "1")["resources"]["accelerators"] == "H100:1"
