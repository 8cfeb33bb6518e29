"""The jobs of a sweep as their files record them: folders, outcomes, plans, and jobs that never started."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import PlanError
from ..plan.artifact import Plan
from ..run.outcome import INTERRUPTED, Outcome

log = logging.getLogger(__name__)

RESUME = "sweep.resume="
"""The override of a sweep that goes on, which is none of its jobs'."""
NO_OUTCOME = "the job left no outcome.json: it was killed, or is still running"


@dataclass(frozen=True)
class Job:
    """One job: its files' content where they are sound, else one sentence that names the file and what is wrong.

    `status` is the outcome's, `interrupted`, or `not started`.
    """

    number: int
    status: str
    exit_code: int
    overrides: Sequence[str]
    outcome: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    report: str = ""
    reason: str = ""


def job_folders(folder: Path) -> list[Path]:
    """Folders of a sweep's jobs, by number; none where `folder` holds no sweep."""
    jobs = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()] if folder.is_dir() else []
    return sorted(jobs, key=lambda path: int(path.name))


def read_jobs(folder: Path) -> list[Job]:
    """Read every job of the sweep in `folder`, by number; those that never started too, from multirun.yaml."""
    found = {int(path.name): _read_job(path) for path in job_folders(folder)}
    for number, overrides in enumerate(planned_jobs(folder)):
        if number not in found:
            found[number] = Job(number, "not started", INTERRUPTED, overrides, reason="not started")
    return [found[number] for number in sorted(found)]


def _read_job(folder: Path) -> Job:
    outcome, problem = _read_outcome(folder / "outcome.json")
    plan, damage = _read_plan(folder / "plan.json")
    overrides = outcome.get("overrides")
    status, code = outcome.get("status", "failed"), outcome.get("exit_code", 1)
    error = outcome.get("error") or {}
    if error.get("type") == "KeyboardInterrupt":
        status, code, error = "interrupted", INTERRUPTED, {"message": "interrupted"}
    elif damage:
        status, code = "failed", max(code, PlanError.exit_code)
    return Job(
        number=int(folder.name),
        status=status,
        exit_code=code,
        overrides=_overrides_of(folder) if overrides is None else overrides,
        outcome=outcome,
        plan=plan,
        report=f"{folder.name}/report.html" if (folder / "report.html").is_file() else "",
        reason="; ".join(text for text in (problem, damage, error.get("message", "")) if text),
    )


def _read_outcome(path: Path) -> tuple[dict[str, Any], str]:
    """The content of an outcome.json, or what is wrong with it."""
    if not path.exists():
        return {}, NO_OUTCOME
    values, problem = _read_json(path)
    if problem:
        return {}, problem
    try:
        Outcome.model_validate(values)
    except ValidationError as errors:
        first = errors.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        return {}, f"{_name(path)} is damaged{f' at {key}' if key else ''}: {first['msg']}"
    return values, ""


def _read_plan(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a plan.json, or what is wrong with it; a job may leave none."""
    if not path.exists():
        return {}, ""
    values, problem = _read_json(path)
    if problem:
        return {}, problem
    try:
        Plan.from_values(values, _name(path))
    except PlanError as error:
        return {}, error.message
    return values, ""


def _read_json(path: Path) -> tuple[Any, str]:
    try:
        return json.loads(path.read_text(encoding="utf-8")), ""
    except (OSError, ValueError, RecursionError) as problem:
        return None, f"{_name(path)} is not readable JSON: {problem}"


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _overrides_of(folder: Path) -> list[str]:
    """A job's overrides from Hydra's own file, where it left no outcome."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        return [str(line) for line in OmegaConf.load(folder / ".hydra" / "overrides.yaml")]
    except (OSError, ValueError, YAMLError):
        return []


def planned_jobs(folder: Path) -> list[list[str]]:
    """The overrides of every job of a sweep, in order, as Hydra's basic sweeper makes them of multirun.yaml.

    Empty where that file is missing, names another sweeper, or is damaged, which is logged.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    damaged = (OSError, ValueError, AttributeError, TypeError, YAMLError, HydraException, OmegaConfBaseException)
    path = folder / "multirun.yaml"
    if not path.is_file():
        return []
    try:
        return _split_up(path)
    except damaged as problem:
        reason = " ".join(str(problem).split())
        log.warning("%s is damaged, so that jobs which did not start are not known: %s", path, reason)
        return []


def _split_up(path: Path) -> list[list[str]]:
    """Make jobs of the overrides in a multirun.yaml, with Hydra's own parser; none of another sweeper's."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import create_config_search_path
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from ..declare.compose import conf_dir

    hydra = OmegaConf.load(path).hydra
    if not str(hydra.sweeper._target_).endswith("BasicSweeper"):
        return []
    given = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    given += [str(one) for one in hydra.overrides.task if not str(one).startswith(RESUME)]
    loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
    batches: list[list[list[str]]] = BasicSweeper.split_arguments(parsed, None)
    return batches[0]
