"""`serve --export`: what is written is what Ray Serve and KubeRay read, and Ray serves it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
import yaml
from PIL import Image
from processes import Process

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.serving import AutoscalingConfig, Serving
from sana_deploy.declare.spec import DeploySpec, Resolve
from sana_deploy.errors import InvalidSpecError, UsageError
from sana_deploy.plan.artifact import Plan
from sana_deploy.serve import command, export, kuberay
from sana_deploy.serve.engines import check_for_ray
from sana_deploy.serve.ray_options import Scaling

Run = Callable[..., subprocess.CompletedProcess[str]]
FOLDER = "/models/sana"
TWO_GPUS = ("model=sana_1600m_controlnet", f"model.source={FOLDER}", "machine=2x8gb", "serve.kuberay.claim=weights")
BOUNDS = ("serve.autoscaling_config.min_replicas=2", "serve.autoscaling_config.max_replicas=6")

_TEXT = {"type": "string"}
_NAMED = {"type": "object", "required": ["name"]}
_RESOURCES = {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": _TEXT}}


def _closed(required: str, **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


_CONTAINER = _closed(
    "name image resources",
    name={"type": "string", "pattern": "^[a-z0-9-]+$"},
    image=_TEXT,
    ports={"type": "array", "items": _closed("containerPort", name=_TEXT, containerPort={"type": "integer"})},
    resources=_closed("limits requests", limits=_RESOURCES["additionalProperties"], requests={"type": "object"}),
    readinessProbe=_closed(
        "httpGet",
        httpGet=_closed("path port", path=_TEXT, port={"type": "integer"}),
        periodSeconds={"type": "integer"},
        timeoutSeconds={"type": "integer"},
        failureThreshold={"type": "integer"},
    ),
    securityContext={"type": "object"},
    volumeMounts={
        "type": "array",
        "items": _closed("name mountPath", name=_TEXT, mountPath=_TEXT, readOnly={"type": "boolean"}),
    },
)
_TEMPLATE = _closed(
    "spec",
    spec=_closed(
        "containers",
        containers={"type": "array", "items": _CONTAINER, "minItems": 1, "maxItems": 1},
        volumes={"type": "array", "items": _NAMED},
        securityContext={"type": "object"},
        terminationGracePeriodSeconds={"type": "integer"},
    ),
)
_START = {"type": "object", "additionalProperties": _TEXT}
RAY_SERVICE = _closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=_closed("name", name=_TEXT, annotations={"type": "object", "additionalProperties": _TEXT}),
    spec=_closed(
        "serveConfigV2 rayClusterConfig",
        serveConfigV2=_TEXT,
        excludeHeadPodFromServeSvc={"const": True},
        rayClusterConfig=_closed(
            "headGroupSpec",
            rayVersion=_TEXT,
            authOptions=_closed("mode", mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling={"type": "boolean"},
            headGroupSpec=_closed("rayStartParams template", rayStartParams=_START, template=_TEMPLATE),
            workerGroupSpecs={
                "type": "array",
                "items": _closed(
                    "groupName minReplicas maxReplicas rayStartParams template",
                    groupName=_TEXT,
                    replicas={"type": "integer"},
                    minReplicas={"type": "integer"},
                    maxReplicas={"type": "integer"},
                    rayStartParams=_START,
                    template=_TEMPLATE,
                ),
            },
        ),
    ),
)
"""What the CRD of KubeRay 1.5 and later says of the fields that we write; Kubernetes drops those it does not know."""


def exported(here: Run, kind: str, folder: Path, *overrides: str) -> dict[str, Any]:
    ended = here("serve", "--export", kind, str(folder / "out.yaml"), *overrides)
    assert ended.returncode == 0, ended.stderr
    assert f"written: {folder / 'out.yaml'}" in ended.stderr
    loaded: dict[str, Any] = yaml.safe_load((folder / "out.yaml").read_text(encoding="utf-8"))
    return loaded


def test_the_config_is_what_ray_serve_reads_and_holds_the_plan_to_the_letter(here: Run, tmp_path: Path) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="the extra serve-ray is not installed")
    plan = compile_spec(compose_spec(TWO_GPUS[:3])).save(tmp_path / "plan.json")
    config = exported(
        here, "ray", tmp_path, f"plan_file={plan}", "serve.replicas=3", "serve.queue=20", "serve.port=8123"
    )
    assert "# serve deploy out.yaml, on a cluster" in (tmp_path / "out.yaml").read_text(encoding="utf-8")
    read = schema.ServeDeploySchema.model_validate(config)
    (application,) = read.applications
    assert application.args["plan"] == plan.read_text(encoding="utf-8")
    assert application.args["serve"]["queue"] == 20
    (replicas,) = application.deployments
    assert (replicas.name, replicas.num_replicas, replicas.max_ongoing_requests) == ("replica", 3, 1)
    assert replicas.ray_actor_options.num_gpus == 2, "as many as the plan has slots"
    assert (read.http_options.host, read.http_options.port) == ("127.0.0.1", 8123), "loopback unless told"


@pytest.mark.parametrize(
    "text", ["a\u2028b\x85c", "\ttab\n  deeper \n\n", "\x00\x1b\n", "\U0001f98a: yes\n", "# no\n---\n...", "'"]
)
def test_what_is_written_is_read_as_it_was(text: str) -> None:
    document = {"plan": text, "again": [text, {"yes": "no", "on": 1.0}]}
    assert yaml.safe_load(export.as_yaml(document)) == document
    assert yaml.safe_load(export.as_yaml({"inner": export.as_yaml(document)}))["inner"] == export.as_yaml(document)


def test_bounds_are_exported_in_ray_serves_words(here: Run, tmp_path: Path) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="the extra serve-ray is not installed")
    config = exported(here, "ray", tmp_path, *TWO_GPUS, *BOUNDS)
    ((replicas,),) = (one.deployments for one in schema.ServeDeploySchema.model_validate(config).applications)
    bounds = pytest.importorskip("ray.serve.config").AutoscalingConfig.model_validate(replicas.autoscaling_config)
    assert (bounds.min_replicas, bounds.initial_replicas, bounds.max_replicas) == (2, 2, 6)
    assert bounds.target_ongoing_requests == 1, "a replica draws one batch at a time: a second one waits"
    assert bounds.upscale_delay_s == 30


def test_the_application_is_built_from_the_config_alone(here: Run, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="the extra serve-ray is not installed")
    from sana_deploy.serve.ray_app import Arguments, build

    overrides = ("precision=fp32", "workload.guidance_scale=3", "serve.startup=77", "serve.warm_up=false")
    config = exported(here, "ray", tmp_path, *overrides)
    args = config["applications"][0]["args"]
    given = Arguments.model_validate(args)
    assert given.options == Serving(engine="ray", startup=77, warm_up=False)
    assert given.workload.guidance_scale == 3
    assert given.loaded.spec.workload == given.workload
    assert build(args)._bound_deployment.name == "api"
    module, _, name = config["applications"][0]["import_path"].partition(":")
    assert (module, name) == (build.__module__, build.__name__)


def test_the_manifest_has_the_structure_of_the_crd_and_a_pod_for_each_replica(here: Run, tmp_path: Path) -> None:
    keys = "serve.keys=/etc/sana/keys"
    manifest = exported(here, "kuberay", tmp_path, *TWO_GPUS, *BOUNDS, keys, "serve.kuberay.image=ghcr.io/me/sana:1.2")
    jsonschema.validate(manifest, RAY_SERVICE)
    cluster = manifest["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 2, 6)
    assert cluster["enableInTreeAutoscaling"] is True
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"] == {"cpu": "4", "memory": "16384Mi", "nvidia.com/gpu": "2"}
    assert worker["readinessProbe"]["httpGet"] == {"path": "/ready", "port": 8000}
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "readinessProbe" not in head, "the application waits for the head, so the head must not wait for it"
    for container in (head, worker):
        assert container["image"] == "ghcr.io/me/sana:1.2"
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/cache", FOLDER, "/etc/sana"}
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}, "probes come from outside of the pod"
    plan = Plan.from_values(json.loads(config["applications"][0]["args"]["plan"]), "the plan")
    assert manifest["metadata"]["annotations"]["sana-deploy/plan"] == plan.digest


def test_a_plan_for_the_cpu_asks_for_no_gpu_and_keeps_its_number_of_replicas(here: Run, tmp_path: Path) -> None:
    manifest = exported(here, "kuberay", tmp_path, "precision=fp32")
    jsonschema.validate(manifest, RAY_SERVICE)
    cluster = manifest["spec"]["rayClusterConfig"]
    assert "enableInTreeAutoscaling" not in cluster
    ((worker,),) = (group["template"]["spec"]["containers"] for group in cluster["workerGroupSpecs"])
    assert set(worker["resources"]["limits"]) == {"cpu", "memory"}
    assert worker["image"] == Serving().kuberay.image


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--export"], 2, "--export takes a kind and a file, got ''"),
        (["--export", "helm", "x.yaml"], 2, "--export takes a kind and a file, got 'helm x.yaml'"),
        (["--export", "ray", "serve.queue=20"], 2, "got 'ray serve.queue=20'"),
        (["--export", "ray", "there.yaml"], 2, "--export: there.yaml is there already"),
        (["--export", "ray", "file/x.yaml", "precision=fp32"], 3, "file/x.yaml cannot be written"),
        (["--export", "kuberay", "x.yaml", *TWO_GPUS[:3]], 2, f"the folder {FOLDER}, which pods do not have"),
        (["--export", "ray", "x.yaml", "precision=fp32", "serve.keys=keys"], 2, "the file keys is read on a cluster"),
        (["--export", "ray", "x.yaml", "resolve.bind={0: GPU-1}"], 2, "with engine=ray Ray does"),
    ],
)
def test_what_cannot_be_exported_is_said_and_no_file_is_left(
    here: Run, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    (tmp_path / "file").write_text("mine")
    ended = here("serve", *arguments)
    assert ended.returncode == code, ended.stderr
    assert says in " ".join(ended.stderr.split())
    assert (tmp_path / "there.yaml").read_text() == "mine"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "there.yaml"]


def test_a_checkpoint_of_the_working_directory_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sana").mkdir()
    spec = compose_spec(["model=sana_1600m_controlnet", "machine=2x8gb"])
    model = spec.model.model_copy(update={"source": "sana"})
    plan = compile_spec(spec).model_copy(update={"spec": spec.model_copy(update={"model": model})})
    with pytest.raises(UsageError, match="the folder sana of this working directory") as caught:
        export.Export("ray", tmp_path / "x.yaml").write(plan, plan.spec, Serving())
    assert caught.value.hint == f"compile the plan with model.source={tmp_path}/sana"
    assert kuberay.folder_of(compile_spec(compose_spec(["precision=fp32"]))) is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_replicas": 2}, "autoscaling_config is of engine=ray"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas=3 must not exceed max_replicas=2"),
        ({"min_replicas": 2}, "min_replicas needs autoscaling_config.max_replicas beside it"),
        ({"min_replicas": 2, "max_replicas": 3}, "replicas=1 must be within autoscaling_config, from 2 to 3"),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(given: dict[str, int], says: str) -> None:
    engine = {} if says.startswith("autoscaling") else {"engine": "ray"}
    replicas = {"replicas": 1} if "replicas=1" in says else {}
    with pytest.raises(InvalidSpecError, match=says):
        Serving.from_mapping({"autoscaling_config": given, **engine, **replicas})


def test_replicas_begin_with_the_plans_number_within_the_bounds() -> None:
    plan = compile_spec(compose_spec(["machine=4x24gb", "model=sana_600m_controlnet", "hardware=single_gpu",
                                      "hardware.replicas=3"]))  # fmt: skip
    assert len(plan.each()) == 3
    for least, most, first in ((1, 8, 3), (4, 8, 4), (1, 2, 2)):
        options = Serving(engine="ray", autoscaling_config=AutoscalingConfig(min_replicas=least, max_replicas=most))
        scaling = Scaling.of(plan, options)
        assert (scaling.least, scaling.first, scaling.most) == (least, first, most)
    assert Scaling.of(plan, Serving(engine="ray")).option == {"num_replicas": 3}


def test_a_plan_for_chosen_gpus_is_not_drawn_on_others() -> None:
    plan = compile_spec(compose_spec(["machine=2xrtx4090", "model=sana_600m_controlnet", "hardware=single_gpu",
                                      "hardware.use=[1]"]))  # fmt: skip
    check_for_ray(plan, Resolve(), 1)
    with pytest.raises(UsageError, match="the plan takes the GPUs 1 only, 2 replicas take 2"):
        check_for_ray(plan, Resolve(), 2)


def test_help_tells_of_exports(here: Run) -> None:
    shown = here("serve", "--help").stdout
    assert "sana-deploy serve --export ray|kuberay FILE" in shown
    assert "max_replicas: null" in shown
    assert command.USAGE in shown


@pytest.mark.slow
def test_ray_serves_an_exported_config(here: Run, small: Callable[..., DeploySpec], tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="the extra serve-ray is not installed")
    plan = compile_spec(small("precision=fp32", "workload.guidance_scale=1"))
    (tmp_path / "keys").write_text("secret")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (f"serve.port={port}", f"serve.keys={tmp_path / 'keys'}", "serve.queue=12", "serve.max_body=1MiB")
    exported(here, "ray", tmp_path, f"plan_file={plan.save(tmp_path / 'plan.json')}", *options)
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer secret"}
    cli = "from ray.serve.scripts import cli; cli()"
    one = Process([sys.executable, "-c", cli, "run", str(tmp_path / "out.yaml")], tmp_path)
    try:
        end, ready = time.monotonic() + 150, 0
        while ready != 200:
            assert time.monotonic() < end, one.said
            with contextlib.suppress(httpx2.TransportError):
                ready = httpx2.get(f"{url}/ready", timeout=30).status_code
            time.sleep(0.2)
        assert httpx2.get(f"{url}/plan", timeout=30, headers=headers).text == plan.to_json()
        body = {"prompt": "a red fox", "size": "96x64", "seed": 5}
        images = f"{url}/v1/images/generations"
        answer = httpx2.post(images, json=body, timeout=120, headers=headers)
        assert answer.status_code == 200, answer.text
        (picture,) = answer.json()["data"]
        assert Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).size == (96, 64)
        assert answer.json()["sana_deploy"]["plan"] == plan.digest
        assert httpx2.post(images, json=body, timeout=30).status_code == 401
        refused = httpx2.post(images, json={**body, "n": 11}, timeout=30, headers=headers)
        assert refused.json()["error"]["message"] == "n is at most 10 here, got 11"
        metrics = httpx2.get(f"{url}/metrics", timeout=30, headers=headers).text
        assert "sana_images_total 1.0" in metrics, "the warm-up is no picture that anybody asked for"
        assert "sana_replicas_ready 1.0" in metrics
        assert httpx2.post(images, content=b"x" * 2**21, timeout=30, headers=headers).status_code == 413
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(images, json={**body, "prompt": "another", "n": 10, "steps": 6}, timeout=0.5, headers=headers)
        end = time.monotonic() + 60
        while "sana_cancelled_total 0.0" in (metrics := httpx2.get(f"{url}/metrics", timeout=30, headers=headers).text):
            assert time.monotonic() < end, "a client that leaves is heard of through Ray's proxy"
        assert "sana_queue_length 0.0" in metrics
    finally:
        one.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.ended(60)
        one.process.kill()
        one.process.wait()
