"""The command: composes with Hydra, runs the stages, maps the outcome to an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from . import diff, interrupts, report, sweep, texts
from .compose import command_error, conf_dir, spec_from_config, typed_overrides
from .deploy import deploy, reject
from .errors import SanaDeployError

_codes: list[int] = []
"""Exit codes of the jobs run in this process; hydra.main drops return values."""


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")  # type: ignore[untyped-decorator]
def _job(config: DictConfig) -> None:
    interrupts.check()
    context = HydraConfig.get()
    folder = Path(context.runtime.output_dir)
    swept = context.mode == RunMode.MULTIRUN
    overrides = [one for one in typed_overrides(context.overrides.task, swept) if not one.startswith(sweep.RESUME)]
    if config.sweep.resume and sweep.is_finished(folder, overrides):
        return
    try:
        spec = spec_from_config(config, overrides)
    except SanaDeployError as problem:
        outcome, document = reject(problem, folder, overrides), None
    else:
        outcome, plan = deploy(spec, folder, overrides, brief=swept)
        document = plan if plan and spec.until in ("compile", "resolve") and not outcome.error else outcome
    if config.get("output") == "json" and not swept:
        sys.stdout.write((document or outcome).to_json())
    _codes.append(0 if swept else outcome.exit_code)  # a sweep's own code comes from its jobs' files


def main() -> None:
    """Run the command line and exit with the code of the table in --help."""
    interrupts.watch()  # a sweep that is killed is summed up when the process ends
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come back here instead of as a traceback
    try:
        _run()
        interrupts.check()
    except (Exception, KeyboardInterrupt) as problem:
        if interrupts.caused(problem):
            report.console().print("interrupted")
            sys.exit(130)
        _fail(problem)
    sys.exit(max(_codes, default=0))


def _run() -> None:
    if sys.argv[1:2] in (["diff"], ["summary"]):
        _codes.append({"diff": diff.main, "summary": sweep.main}[sys.argv[1]](sys.argv[2:]))
        return
    sys.argv[1:] = texts.command_texts(sweep.command_line(sys.argv[1:]))
    _job()
    _codes.append(sweep.finish())


def _fail(problem: BaseException) -> None:
    """Exit with one clear sentence."""
    if isinstance(problem, BrokenPipeError):  # whoever read our output has gone, e.g. `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    error = command_error(problem)
    report.show_error(error)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
