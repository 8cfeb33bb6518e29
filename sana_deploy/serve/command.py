"""The command `serve`: from overrides to a service that runs until it is told to stop."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..declare.compose import compose_config, spec_from_config
from ..declare.free_text import key_of
from ..declare.keys import conf_dir
from ..declare.serving import Serving
from ..declare.spec import DeploySpec
from ..errors import UsageError
from ..plan.artifact import Plan, ResolvedPlan
from ..plan.saved_request import saved_plan
from ..report import terminal as report
from .export import Export, asked

log = logging.getLogger(__name__)
Compile = Callable[[DeploySpec], Plan]
_NEEDED: Mapping[str, str] = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}
"""Module -> package of the extra."""
_NEEDED_FOR_RAY: Mapping[str, str] = {"ray": "ray[serve]", "watchfiles": "ray[serve]", "aiohttp_cors": "ray[serve]"}
"""The same of the extra for `engine=ray`; ray alone comes with Hydra's launcher too."""
_OF_A_RUN = ("until", "output", "sweep", "hydra")
"""Keys that a service has no use for."""
USAGE = """\
sana-deploy serve: offer a plan as an images API in the form of OpenAI's, until SIGTERM or Ctrl-C.

Usage: sana-deploy serve plan_file=PLAN.json [serve.KEY=VALUE ...]
       sana-deploy serve [GROUP=OPTION ...] [KEY=VALUE ...]
       sana-deploy serve --export ray|kuberay FILE plan_file=PLAN.json [KEY=VALUE ...]
  sana-deploy serve plan_file=plan.json serve.port=8080
  sana-deploy serve model=sana_1600m_controlnet model.source=FOLDER_OR_REPO hardware=multi_gpu_balanced
  curl -s localhost:8000/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "a red fox"}'

Routes: POST /v1/images/generations, POST /v1/images/edits, GET /v1/models, /health, /ready, /metrics, /plan, and / for
a page to try it. Once requests are drawn, stderr gets a line that begins with "ready:". SIGTERM finishes what was
accepted and ends with code 0; a second one gives up what is left. Groups and exit codes: sana-deploy --help

--export serves nothing: it writes the config of `serve deploy` (ray), or a RayService for `kubectl apply` (kuberay),
with the plan in it. A file that is there already is not written over.

Values of the group serve, with what they are without being given:

"""


def main(arguments: Sequence[str], compile_spec: Compile) -> int:
    """Run the command.

    Args:
        arguments: what stands behind `serve`.
        compile_spec: makes a plan of a declaration.

    Returns:
        0 once the service was told to stop and has, or once the export is written.

    Raises:
        UsageError, SanaDeployError: it cannot be started, or has lost its last GPU.
    """
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(USAGE + (conf_dir() / "serve" / "default.yaml").read_text(encoding="utf-8"))
        return 0
    check_installed("local")
    wanted, arguments = asked(arguments)
    spec, options = _declared(arguments)
    check_installed(options.engine)
    if spec.plan_file:
        plan, spec = saved_plan(spec, arguments)
    else:
        plan = compile_spec(spec)
    if wanted:
        report.show_plan(plan)
        _say(f"written: {export(wanted, plan, spec, options)}")
    else:
        _run(plan, spec, options)
    return 0


def export(wanted: Export, plan: Plan, spec: DeploySpec, options: Serving) -> Path:
    """Write a plan for Ray.

    Raises:
        UsageError, PlanError: Ray cannot keep what the plan says.
        InputError: the file cannot be written.
    """
    from .engines import check_for_ray

    check_for_ray(plan, spec.resolve)
    return wanted.write(plan, spec, options)


def check_installed(engine: str) -> None:
    """Refuse to serve without what an engine needs.

    Raises:
        UsageError: naming the extra that has it.
    """
    if engine == "ray":
        _check_extra("serve-ray", _NEEDED_FOR_RAY)
    else:
        _check_extra("serve", _NEEDED)


def _check_extra(extra: str, needed: Mapping[str, str]) -> None:
    missing = list(dict.fromkeys(package for module, package in needed.items() if find_spec(module) is None))
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"{', '.join(missing)} {verb} needed to serve and {verb} not installed",
            where="serve",
            hint=f'the extra {extra} has what is needed: pip install "sana-deploy[{extra}]"',
        )


def _declared(arguments: Sequence[str]) -> tuple[DeploySpec, Serving]:
    """The declaration and the options that the overrides give."""
    for one in arguments:
        key = key_of(one)
        if "=" not in one:
            raise UsageError(f"{one!r} is no override", where="serve", hint="values read KEY=VALUE; see serve --help")
        if key.partition(".")[0] in _OF_A_RUN:
            raise UsageError(f"{key} is of a single run, a service has no use for it", where=key, hint="leave it out")
    config = compose_config(arguments)
    options = Serving.from_config(config)
    others = [one for one in arguments if key_of(one).partition(".")[0] != "serve"]
    return spec_from_config(config, others), options


def _run(plan: Plan, spec: DeploySpec, options: Serving) -> None:
    from ..facts.machine import probe_torch
    from . import server
    from .app import build
    from .assembly import bearer_keys
    from .engines import machine_for_ray
    from .gate import is_local

    wanted, keys = spec.resolve, bearer_keys(options.keys)
    opened = server.listen(options.host, options.port)
    report.show_plan(plan)
    machine = probe_torch() if options.engine == "local" else machine_for_ray(probe_torch())
    resolved = plan.resolve(machine, allow=wanted.allow, bind=wanted.bind, verify=wanted.verify)
    report.show_resolved(resolved)
    service = _service(resolved, spec, options, keys)
    server.log_to_stderr()
    if not keys and not is_local(options.host):
        log.warning("whoever reaches %s may draw: serve.keys=FILE asks for a key", options.host)
    url = server.url_of(opened)
    _say(f"loading; {url} answers 503 until it is done")
    server.serve(service.engine, build(service), opened, options, lambda: _say(_ready_line(url, resolved, service)))
    _say("stopped")


def _service(resolved: ResolvedPlan, spec: DeploySpec, options: Serving, keys: Sequence[str]) -> Any:
    from .assembly import assemble
    from .engines import engine_of

    work, wanted = spec.workload, spec.resolve
    return assemble(resolved, work, options, keys, lambda told: engine_of(resolved, options, wanted, work, told))


def _ready_line(url: str, resolved: ResolvedPlan, service: Any) -> str:
    work, each = service.orders.defaults, resolved.each()
    places = [", ".join(sorted({*one.device_map.values(), *one.unit_devices.values()})) for one in each]
    where = places[0] if len(each) == 1 else f"{len(each)} replicas: {'; '.join(places)}"
    if service.options.engine == "ray":
        where = f"{service.engine.standing.replicas} replicas of Ray Serve"
    asks = ", a key is asked for" if service.keys else ""
    shape = f"{work.width}x{work.height} px, {work.steps} steps"
    return f"ready: {url}  model {service.orders.model}, {shape}, on {where}{asks}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
