"""Hydra's composition, from Python and from the command line: overrides -> `DeploySpec`."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Sequence
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ComposeError, InputError, InvalidSpecError, SanaDeployError, UsageError, did_you_mean
from .explain import no_component
from .free_text import as_typed, key_of, literal, prompt_of, quoted_hint
from .keys import conf_dir as conf_dir
from .keys import known_keys, nearest_key
from .pipelines import COMPONENTS
from .spec import DeploySpec, component_mappings

OF_COMMANDS = ("serve", "advise")
"""Groups that a command of the same name reads, and that are not of a deployment."""
_LOCK = threading.Lock()
"""Hydra's composition state is one global."""


def compose_spec(overrides: Sequence[str] = ()) -> DeploySpec:
    """Compose the configuration with Hydra `overrides` and validate it; safe inside another Hydra app.

    Raises:
        ComposeError: a group, option or key is not known, or an override is malformed.
        InvalidSpecError: a value breaks its bounds.
        InputError: the file of `workload.prompt_file` cannot be read.
        UsageError: both a prompt and a file with one are given.
    """
    return spec_from_config(compose_config(overrides), overrides)


def compose_config(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose the whole configuration with Hydra `overrides`, not validated yet.

    Raises:
        ComposeError: see `compose_spec`.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    with _LOCK:
        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(conf_dir()), job_name="sana_deploy", version_base="1.3"):
                return cast("DictConfig", compose("config", overrides=[literal(one) for one in overrides]))
        except (HydraException, OmegaConfBaseException) as problem:
            raise compose_error(problem) from problem
        finally:
            GlobalHydra.instance().hydra = outer


def spec_from_config(config: DictConfig, overrides: Sequence[str] = ()) -> DeploySpec:
    """Validate a composed configuration: `workload.prompt_file` is read, and `workload.seed=random` is drawn.

    Raises:
        InvalidSpecError: a value is missing or breaks its bounds.
        InputError, UsageError: see `compose_spec`.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as problem:
        key = str(getattr(problem, "full_key", "") or "a mandatory value")
        raise InvalidSpecError("this value must be given", where=key, hint=f"{key}=VALUE") from None
    except OmegaConfBaseException as problem:
        raise compose_error(problem) from problem
    for one in overrides:
        if (group := key_of(one).partition(".")[0]) in OF_COMMANDS:
            raise UsageError(f"{one} is of the command {group}", where=group, hint=f"sana-deploy {group} ...")
    declared = cast("dict[str, Any]", values)
    for group in ("sweep", *OF_COMMANDS):
        declared.pop(group, None)
    if isinstance(workload := declared.get("workload"), dict):
        _settle_request(workload, overrides)
    return DeploySpec.from_mapping(declared)


def typed_overrides(given: ListConfig, swept: bool) -> list[str]:
    """Return the overrides of a job as a person typed them; those of a sweep as Hydra reads them."""
    kept = cast("list[str]", OmegaConf.to_container(given))  # not resolved: a prompt may hold ${
    return kept if swept else [as_typed(one) for one in kept]


def _settle_request(workload: dict[str, Any], overrides: Sequence[str]) -> None:
    """Read the prompt's file and draw the seed, so that a declaration says what is drawn."""
    path = workload.pop("prompt_file", None)
    if path is not None and any(key_of(one) == "workload.prompt" for one in overrides):
        raise UsageError(
            f"a prompt is given, and the file {path} with another one",
            where="workload.prompt",
            hint="leave one of them out; workload.prompt_file=null takes no file",
        )
    if path is not None:
        workload["prompt"] = prompt_of(str(path))
    if workload.get("steps", 0) is None:
        del workload["steps"]  # the pipeline's own, once it is known
    if workload.get("seed") == "random":
        workload["seed"] = secrets.randbelow(2**32)


def compose_error(problem: Exception) -> SanaDeployError:
    """Turn Hydra's or OmegaConf's complaint into one sentence with the nearest known word."""
    text = f"{problem} {problem.__cause__ or ''}"
    key = re.search(r"Could not (?:override|append to config[^']*) '([\w.@/]+)'", text)
    if key:
        inner = re.search(rf"full_key: ({re.escape(key.group(1))}\.[\w.]+)", text)  # of a mapping given as a whole
        path = inner.group(1) if inner else key.group(1)
        mapping, word = ".".join(path.split(".")[:2]), ".".join(path.split(".")[2:])
        if word and mapping in component_mappings() and word not in COMPONENTS and known_keys().get(mapping):
            return no_component(path)
        return ComposeError("there is no such key", where=path, hint=nearest_key(path))
    option = re.search(r"Could not find '(\w+)/([\w.-]+)'", text)
    if option:
        group, name = option.groups()
        known = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        return ComposeError(f"{name!r} is not an option of this group", where=group, hint=did_you_mean(name, known))
    first = str(problem).strip().splitlines() or [type(problem).__name__]
    if hint := quoted_hint(override := str(getattr(problem, "override", ""))):
        return ComposeError(f"Hydra cannot read this text: {first[0]}", where=key_of(override), hint=hint)
    return ComposeError(first[0], hint="see --help for the groups and keys")


def command_error(problem: BaseException) -> SanaDeployError:
    """Turn what the command ended with into one sentence; what is a defect of ours is raised again."""
    from hydra.errors import HydraException

    if isinstance(problem, (HydraException, OmegaConfBaseException)):
        return compose_error(problem)
    if isinstance(problem, OSError):
        hint = "hydra.run.dir=FOLDER, or hydra.sweep.dir=FOLDER in a sweep"
        return InputError(f"the output folder cannot be written: {problem}", where="hydra.run.dir", hint=hint)
    if not isinstance(problem, SanaDeployError):
        raise problem
    return problem
