"""The stages of one run in order, and the files each leaves in the run folder. Never raises: returns an `Outcome`."""

from __future__ import annotations

import contextlib
import logging
import shlex
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _interrupts
from ._files import write_text
from ._models import Diagnostic
from ._startup import Laps, quick_imports, read_ahead, start_gpus
from .api import compile_spec
from .declare.control_image import drawn_seed
from .declare.policies import fragile_components
from .declare.request_remarks import request_remarks
from .declare.spec import STAGES, DeploySpec, Stage, VirtualMachine
from .errors import InfeasibleError, RunError, SanaDeployError
from .facts.checkpoint import settled
from .facts.headers import weight_files
from .facts.virtual_machine import describe_machine
from .plan.artifact import Plan, ResolvedPlan
from .plan.remedies import out_of_float16, roomier
from .plan.saved_request import saved_plan
from .report import terminal as report
from .report.progress import progress, progress_each
from .run.outcome import Audit, Measured, Outcome, Rehearsal, failure_of

log = logging.getLogger(__name__)


@dataclass
class Run:
    """State of one run as it passes the stages."""

    spec: DeploySpec
    folder: Path
    brief: bool = False
    overrides: Sequence[str] = ()
    stage: Stage = "compile"
    plan: Plan | None = None
    resolved: ResolvedPlan | None = None
    staged: list[Any] = field(default_factory=list)
    pipelines: list[Any] = field(default_factory=list)
    rehearsal: Rehearsal | None = None
    audit: Audit | None = None
    measured: Measured = field(default_factory=Measured)
    images: list[str] = field(default_factory=list)
    remarks: list[Diagnostic] = field(default_factory=list)

    def outcome(self, problem: BaseException | None = None) -> Outcome:
        """Describe where the run stands; with `problem`, why it ended there."""
        status, code, error = ("done", 0, None) if problem is None else failure_of(problem)
        return Outcome(
            status=status,  # type: ignore[arg-type]
            exit_code=code,
            stage=self.stage,
            plan_digest=self.plan.digest if self.plan else None,
            device_map={str(k): v for k, v in self.resolved.device_map.items()} if self.resolved else {},
            other_device_maps=[dict(one.device_map) for one in self.resolved.others] if self.resolved else [],
            measured=self.measured,
            rehearsal=self.rehearsal,
            audit=self.audit,
            images=self.images,
            seed=self.spec.workload.seed,
            error=error,
            diagnostics=self.remarks,
            overrides=list(self.overrides),
        )


def deploy(
    spec: DeploySpec, folder: Path, overrides: Sequence[str] = (), brief: bool = False
) -> tuple[Outcome, Plan | None]:
    """Run the stages up to `spec.until`, write plan.json and outcome.json, and report on stderr.

    Args:
        spec: the declaration.
        folder: the run folder.
        overrides: the command line's, to tell what the user set beside a `plan_file`.
        brief: one line for the whole run, as in a sweep.
    """
    run = Run(spec, folder, brief, overrides)
    if not brief:
        return _deploy(run)
    from .run.gpu_locks import holding_gpus

    with holding_gpus(spec):
        return _deploy(run)


def _deploy(run: Run) -> tuple[Outcome, Plan | None]:
    spec, folder = run.spec, run.folder
    try:
        if spec.plan_file:
            run.plan, run.spec = saved_plan(spec, run.overrides)
        for stage in STAGES[: STAGES.index(spec.until) + 1]:
            run.stage = stage
            _STEPS[stage](run)
        outcome = run.outcome()
    except (Exception, KeyboardInterrupt) as problem:
        if _interrupts.caused(problem):
            write_text(folder / "outcome.json", run.outcome(KeyboardInterrupt()).to_json())
            raise KeyboardInterrupt from problem
        outcome = run.outcome(problem)
        log.info("stage %s ended", run.stage, exc_info=problem)
    write_text(folder / "outcome.json", outcome.to_json())
    _write_page(run, outcome)
    if run.brief:
        report.show_brief(outcome)
    else:
        report.show_outcome(outcome, spec, folder)
    return outcome, run.plan


def _write_page(run: Run, outcome: Outcome) -> None:
    """Write report.html beside the plan."""
    if run.plan is None:
        return
    from .report.html import plan_page, thumbnail

    command = shlex.join(["python", "-m", "sana_deploy", *run.overrides])
    pictures = [thumbnail(run.folder / image) for image in run.images[:4]]
    write_text(run.folder / "report.html", plan_page(run.plan, outcome, command, pictures))


def reject(problem: SanaDeployError, folder: Path, overrides: Sequence[str] = ()) -> Outcome:
    """Write and report the outcome of a declaration that is not valid."""
    status, code, error = failure_of(problem)
    outcome = Outcome(status=status, exit_code=code, stage="compile", error=error, overrides=list(overrides))
    write_text(folder / "outcome.json", outcome.to_json())
    report.show_error(problem)
    return outcome


def _compile(run: Run) -> None:
    run.spec = settled(run.spec)
    asked = run.spec.workload
    run.remarks += [*drawn_seed(asked, run.overrides), *request_remarks(run.spec.pipeline, asked)]
    if run.plan is None:
        with progress("profiling", run.brief) as advance:
            try:
                run.plan = compile_spec(run.spec, on_progress=lambda done, of: advance(f"point {done}/{of}", done, of))
            except InfeasibleError as problem:
                run.plan = problem.plan
                if run.plan:
                    run.plan.save(run.folder / "plan.json")
                raise
        run.spec = run.spec.model_copy(update={"precision": run.plan.spec.precision})
    run.plan.save(run.folder / "plan.json")
    if not run.brief:
        report.show_plan(run.plan)


def _resolve(run: Run) -> None:
    assert run.plan is not None
    wanted = run.spec.resolve
    machine = describe_machine(VirtualMachine(kind="virtual", gpus=wanted.machine)) if wanted.machine else None
    verify = wanted.verify and run.spec.plan_file is not None  # else it has just been read to be compiled
    run.resolved = run.plan.resolve(machine, allow=wanted.allow, bind=wanted.bind, verify=verify)
    if not run.brief:
        report.show_resolved(run.resolved)


def _apply(run: Run) -> None:
    assert run.resolved is not None
    virtual, seconds, clock = run.resolved.machine.kind == "virtual", {}, Laps()
    starting = None if virtual else _ahead_of_load(run.resolved)
    with progress_each("loading", run.brief) as advance:
        with quick_imports():
            from .rehearsal.replicas import stage
            from .run.hook import border_of
            from .run.replicas import load_pipelines
        seconds["import"] = clock.lap()
        if starting is not None:
            starting.join()
            seconds["start"] = clock.lap()
        if virtual:
            run.staged = stage(run.resolved, progress=advance)
            run.pipelines = [one.pipeline for one in run.staged]
        else:
            run.pipelines = load_pipelines(run.resolved, advance)
        seconds["load"] = clock.lap()
    run.remarks += [_out_of_range(text, run.resolved.plan) for text in border_of(run.pipelines[0]).notes]
    weights = sum(part.weights_bytes for part in run.resolved.plan.wholes.values())
    loaded = 0 if virtual else weights * len(run.pipelines)
    run.measured = Measured(seconds=seconds, loaded_bytes=loaded)


def _ahead_of_load(resolved: ResolvedPlan) -> threading.Thread | None:
    """Have the weights read and the GPUs started while libraries are imported; return what starts the GPUs."""
    model = resolved.plan.spec.model
    folder = Path(getattr(model, "source", None) or "").expanduser()
    with contextlib.suppress(SanaDeployError):  # loading will say it
        variant = getattr(model, "variant", None)
        parts = [folder / name for name in resolved.plan.pipeline.names if (folder / name / "config.json").is_file()]
        read_ahead([file for part in parts for file in weight_files(part, variant, part.name)])
    each = (resolved, *resolved.others)
    return start_gpus({at for one in each for at in (*one.device_map.values(), *one.unit_devices.values())})


def _out_of_range(text: str, plan: Plan) -> Diagnostic:
    """Values of a component, which `text` names, that its dtype cannot hold."""
    hint = out_of_float16(plan, [name for name in plan.pipeline.names if f" {name} " in text], compile_spec)
    return Diagnostic(type="out_of_range", severity="warning", message=text, where="precision.components", hint=hint)


def _generate(run: Run) -> None:
    from .run.prompts import cut_prompts
    from .run.request_state import RequestState

    states = [RequestState() for _ in run.pipelines]
    if not run.staged or run.staged[0].host.fidelity == "numbers":  # in shapes, the tokenizer may be a stand-in
        run.remarks += cut_prompts(run.pipelines[0], run.spec.workload)
    try:
        (_rehearse if run.staged else _run)(run, states)
    except RunError as problem:
        if run.plan:
            problem.hint = _checked_hint(problem, run.plan)
        raise
    finally:
        hint = "hardware.on_decode_oom=raise makes this an error"
        run.remarks += [
            Diagnostic(type="decoded_in_tiles", severity="warning", message=text, where="generate", hint=hint)
            for text in dict.fromkeys(text for state in states for text in state.remarks)
        ]
        run.remarks += [
            Diagnostic(type="eager_calls", severity="info", message=text, where="runtime")
            for text in dict.fromkeys(text for state in states for text in state.eager_sentences())
        ]
        run.remarks += [
            Diagnostic(type="uncompiled", severity="warning", message=text, where="runtime")
            for text in dict.fromkeys(text for state in states for text in state.compiling.sentences())
        ]


def _checked_hint(problem: RunError, plan: Plan) -> str:
    """The failure's own hint, or in its place a change that was planned on this machine."""
    facts = problem.facts
    if facts.get("out_of_memory"):
        return roomier(plan, compile_spec) or problem.hint
    if facts.get("dtype") == "float16":
        return out_of_float16(plan, [facts["component"]], compile_spec)
    if "image" in facts:
        fragile = fragile_components({name: part.dtype for name, part in plan.components.items()}, plan.pipeline)
        return out_of_float16(plan, fragile or plan.pipeline.names, compile_spec)
    return problem.hint


def _run(run: Run, states: list[Any]) -> None:
    from .run.generate import save_images
    from .run.replicas import generate_each

    asked = run.spec.workload
    recorder = _recorder(states[0]) if run.spec.precision.audit else None
    with progress("denoising", run.brief) as advance:
        reached = 0

        def stepped(done: int, of: int) -> None:
            nonlocal reached
            reached = done
            advance(f"step {done}/{of}", done, of)

        for state in states:
            state.compiling.on_start = lambda name: advance(f"compiling the {name}", reached, asked.steps)
        images, measured = generate_each(run.pipelines, asked.bounds, asked.request, stepped, states)
    seconds = {**run.measured.seconds, **measured.seconds}
    run.measured = measured.model_copy(update={"seconds": seconds, "loaded_bytes": run.measured.loaded_bytes})
    run.images = [path.name for path in save_images(images, run.folder)]
    run.remarks += _seeds_drawn(run)
    if recorder is not None:
        _audit(run, recorder, images[: asked.batch])


def _seeds_drawn(run: Run) -> list[Diagnostic]:
    """Say which image is of which seed where several replicas drew."""
    from .run.replicas import request_of

    count, batch, request = len(run.pipelines), run.spec.workload.batch, run.spec.workload.request
    if count == 1:
        return []
    drawn = [f"{run.images[number * batch]} seed {request_of(request, number).seed}" for number in range(count)]
    message = f"{count} replicas drew at once, each with a seed of its own: {', '.join(drawn)}"
    return [Diagnostic(type="seeds", severity="info", message=message, where="workload.seed")]


def _recorder(state: Any) -> Any:
    """Record what passes the borders of one request, for an audit."""
    from .run.audit import Recorder

    recorder = Recorder()
    recorder.attach(state)
    return recorder


def _audit(run: Run, recorder: Any, images: list[Any]) -> None:
    """Compare with float32; the planned pipeline leaves its GPUs first."""
    from .run.audit import audit, in_float32

    assert run.plan is not None
    reference = in_float32(run.spec, compile_spec)
    run.pipelines = []
    with progress("auditing", run.brief):
        run.audit = audit(recorder, images, run.plan, reference, run.spec.workload)


def _rehearse(run: Run, states: list[Any]) -> None:
    from .rehearsal.replicas import rehearse_each
    from .run.generate import save_images

    with progress("rehearsing", run.brief) as advance:
        ended = rehearse_each(
            run.staged, run.spec.workload, lambda done, of: advance(f"step {done}/{of}", done, of), states
        )
    run.rehearsal = ended.report
    if run.spec.precision.audit:
        message = "an audit computes on this host's devices, a rehearsal does not: nothing was compared"
        run.remarks.append(Diagnostic(type="no_audit", severity="info", message=message, where="precision.audit"))
    seconds = {**run.measured.seconds, **ended.measured.seconds}
    run.measured = ended.measured.model_copy(update={"seconds": seconds})
    run.images = [path.name for path in save_images(ended.images, run.folder)]


_STEPS = {"compile": _compile, "resolve": _resolve, "apply": _apply, "generate": _generate}
