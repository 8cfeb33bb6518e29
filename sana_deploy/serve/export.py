"""`sana-deploy serve --export`: a plan as a config for `serve deploy`, or as a KubeRay `RayService`. Imports no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from .._files import write_text
from ..declare.serving import Serving
from ..declare.spec import DeploySpec
from ..errors import UsageError
from ..plan.artifact import Plan
from .kuberay import PORT, folder_of, manifest
from .ray_options import REPLICA, Scaling, replica_options

OPTION = "--export"
BUILDER = "sana_deploy.serve.ray_app:build"
"""What Ray imports and calls with the arguments of a config."""
_EVERYWHERE = "0.0.0.0"
_HEADER = """\
# Written by sana-deploy serve --export {kind}. To change the plan or the number of replicas, export again.
# {usage}
"""
_USAGE = {"ray": "serve deploy {file}, on a cluster whose nodes have sana_deploy", "kuberay": "kubectl apply -f {file}"}
_OF_PROCESS = {"host", "port", "kuberay"}
"""Keys of the group `serve` that the application does not read; its address is that of Ray's proxy."""


@dataclass(frozen=True)
class Export:
    """What is to be written where."""

    kind: str
    file: Path

    def write(self, plan: Plan, spec: DeploySpec, options: Serving) -> Path:
        """Write the whole file, or none.

        Raises:
            UsageError: the plan names paths that a cluster does not have.
            InputError: the file cannot be written.
        """
        check_paths(plan, options, pods=self.kind == "kuberay")
        if self.kind == "ray":
            document = serve_config(plan, spec, options)
        else:
            config = serve_config(plan, spec, options.model_copy(update={"host": _EVERYWHERE, "port": PORT}))
            document = manifest(plan, options, as_yaml(config), version("ray"))
        header = _HEADER.format(kind=self.kind, usage=_USAGE[self.kind].format(file=self.file.name))
        return write_text(self.file, header + as_yaml(document), OPTION)


def asked(arguments: Sequence[str]) -> tuple[Export | None, list[str]]:
    """What `--export KIND FILE` among the arguments of `serve` asks for, and the others.

    Raises:
        UsageError: see `named`.
    """
    wanted, others = named(arguments, tuple(_USAGE), "serve")
    return (Export(*wanted), [*others, "serve.engine=ray"]) if wanted else (None, others)


def named(arguments: Sequence[str], kinds: Sequence[str], command: str) -> tuple[tuple[str, Path] | None, list[str]]:
    """The kind and the file of `--export KIND FILE` among the arguments of a command, and the others.

    Raises:
        UsageError: kind or file are missing, or the file is there already.
    """
    others = list(arguments)
    if OPTION not in others:
        return None, others
    place = others.index(OPTION)
    kind, file = [*others[place + 1 : place + 3], "", ""][:2]
    if kind not in kinds or not file or file.startswith("-") or "=" in file:
        usage = f"{OPTION} {'|'.join(kinds)} FILE"
        given = " ".join([kind, file]).strip()
        raise UsageError(f"{OPTION} takes a kind and a file, got {given!r}", where=command, hint=usage)
    path = Path(file).expanduser()
    if path.exists():
        raise UsageError(f"{path} is there already", where=OPTION, hint="another name, or remove it first")
    return (kind, path), [*others[:place], *others[place + 3 :]]


def serve_config(plan: Plan, spec: DeploySpec, options: Serving) -> dict[str, Any]:
    """The config of Ray Serve, in the form of its `ServeDeploySchema`.

    Args:
        spec: the declaration, for defaults of requests and for how the plan is bound.
    """
    given = options.model_dump(mode="json", exclude_defaults=True, exclude=_OF_PROCESS)
    gpus = len(plan.each()[0].slots)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": options.host, "port": options.port},
        "applications": [
            {
                "name": "sana",
                "route_prefix": "/",
                "import_path": BUILDER,
                "args": {
                    "plan": plan.to_json(),
                    "serve": {**given, "host": options.host},
                    "workload": spec.workload.model_dump(mode="json", exclude_defaults=True),
                    "resolve": {"allow": list(spec.resolve.allow), "verify": spec.resolve.verify},
                },
                "deployments": [{"name": REPLICA, **replica_options(Scaling.of(plan, options), gpus, options.drain)}],
            }
        ],
    }


_BREAKS = frozenset("\r\x85\u2028\u2029\ufeff")
"""Characters that YAML takes for the end of a line or of nothing, unless they are quoted."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Writes texts of several lines as they are read, and everything where it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        """See PyYAML."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = '"' if _BREAKS & set(value) else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(document: Any) -> str:
    """A document as YAML; what it is read as is what it was."""
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def check_paths(plan: Plan, options: Serving, pods: bool) -> None:
    """Refuse paths that other nodes do not have.

    Args:
        pods: whether the plan is for pods, which have what a volume holds.

    Raises:
        UsageError: a path is relative, or pods have no volume with the checkpoint.
    """
    folder = folder_of(plan)
    if folder and not folder.is_absolute():
        message = f"the checkpoint is the folder {folder} of this working directory, which a cluster does not have"
        raise UsageError(
            message, where="model.source", hint=f"compile the plan with model.source={folder.expanduser().resolve()}"
        )
    if folder and pods and options.kuberay.claim is None:
        message = f"the checkpoint is the folder {folder}, which pods do not have"
        hint = "serve.kuberay.claim=NAME of the PersistentVolumeClaim that holds it"
        raise UsageError(message, where="serve.kuberay.claim", hint=hint)
    if options.keys and not Path(options.keys).is_absolute():
        raise UsageError(f"the file {options.keys} is read on a cluster", where="serve.keys", hint="an absolute path")
