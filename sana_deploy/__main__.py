"""The command: composes with Hydra, runs the stages, maps the outcome to an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from . import _interrupts, commands, sweep
from ._startup import as_process
from .declare import free_text
from .declare.compose import conf_dir, spec_from_config, typed_overrides
from .errors import SanaDeployError
from .report import terminal as report
from .report.jobs import RESUME
from .run.outcome import INTERRUPTED, document
from .stages import deploy, reject

_codes: list[int] = []
"""Exit codes of the jobs run in this process; hydra.main drops return values."""


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")  # type: ignore[untyped-decorator]
def _job(config: DictConfig) -> None:
    _interrupts.check()
    context = HydraConfig.get()
    folder = Path(context.runtime.output_dir)
    swept = context.mode == RunMode.MULTIRUN
    overrides = [one for one in typed_overrides(context.overrides.task, swept) if not one.startswith(RESUME)]
    if config.sweep.resume and sweep.is_finished(folder, overrides):
        return
    try:
        spec = spec_from_config(config, overrides)
    except SanaDeployError as problem:
        outcome, plan = reject(problem, folder, overrides), None
    else:
        outcome, plan = deploy(spec, folder, overrides, brief=swept)
    if config.get("output") == "json" and not swept:
        sys.stdout.write(document(outcome, plan))
    _codes.append(0 if swept else outcome.exit_code)  # a sweep's own code comes from its jobs' files


def main() -> None:
    """Run the command line and exit with the code of the table in --help."""
    _interrupts.watch()  # a sweep that is killed is summed up when the process ends
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come back here instead of as a traceback
    try:
        _run()
        _interrupts.check()
    except (Exception, KeyboardInterrupt) as problem:
        if _interrupts.caused(problem):
            report.console().print("interrupted")
            sys.exit(INTERRUPTED)
        commands.fail(problem, sys.argv[1:])
    sys.exit(max(_codes, default=0))


def _run() -> None:
    code = commands.run_own(sys.argv[1:], _job)
    if code is not None:
        _codes.append(code)
        return
    sys.argv[1:] = free_text.command_texts(sweep.command_line(commands.of_run(sys.argv[1:])))
    _job()
    _codes.append(sweep.finish())


def command() -> None:
    """Run `main` as a process of its own, which ends as soon as everything is written."""
    as_process(main)


if __name__ == "__main__":
    command()
