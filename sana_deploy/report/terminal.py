"""What people see: pure renderers of plans, outcomes and sweeps, on stderr. Nothing is decided here."""

from __future__ import annotations

import contextlib
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .._models import Diagnostic
from .._units import human_bytes
from ..errors import SanaDeployError
from ..facts.machine import host_memory
from ..plan.artifact import Plan
from ..plan.records import Place, Slot, Transfer, place_words
from ..plan.replicas import alike
from ..run.outcome import Audit, Measured, Outcome, Rehearsal
from .wording import (
    OTHERS_WORDS,
    considered_sentence,
    faster_sentence,
    groups_words,
    image_words,
    knob_sentence,
    model_words,
    numbers_words,
    overlap_words,
    pool_words,
    rejection_words,
    replicas_words,
    runtime_words,
    steps_words,
    taken_words,
)

if TYPE_CHECKING:
    from ..declare.spec import DeploySpec
    from ..plan.artifact import ResolvedPlan

BAR_CELLS = 24
CHOSEN = "auto_runtime"
"""The remark that says why a runtime was chosen; it stands in the head of a plan."""


def console() -> Console:
    """The console for people: stderr, soft-wrapped, honouring NO_COLOR and dumb terminals."""
    return Console(stderr=True, highlight=False)


_GLYPHS = "█▓▒▞░"
_LETTERS = "waou."
"""What bars are drawn with: weights, activations, overhead, for others, free."""
_STYLES = ("blue", "magenta", "yellow", "red")
_PARTS = ("weights", "activations", "context, headroom", OTHERS_WORDS, "free")


def bar(sizes: Sequence[int], capacity: int, unicode: bool = True) -> Text:
    """Draw `capacity` as BAR_CELLS cells: weights, activations, overhead and others' in bytes, the rest is free.

    Readable without colour: every part has a glyph of its own. Parts that exceed `capacity` are drawn shorter.
    """
    text, filled, glyphs = Text(), 0, _GLYPHS if unicode else _LETTERS
    whole = max(capacity, sum(sizes), 1)
    for size, glyph, style in zip(sizes, glyphs, _STYLES, strict=False):
        start, end = (round(n / whole * BAR_CELLS) for n in (filled, filled + size))
        text.append(glyph * (end - start), style=style)
        filled += size
    text.append(glyphs[-1] * (BAR_CELLS - len(text)), style="dim")
    return text


def render_plan(plan: Plan, unicode: bool = True) -> RenderableType:
    """Render a plan: each place with its components, what moves, what was considered, remarks.

    Short enough, with a rehearsal, for a terminal of 25 lines where two GPUs are used; report.html has the rest.
    """
    spec, work = plan.spec, plan.spec.workload
    head = Text.assemble(
        ("plan ", "dim"), plan.digest[7:19], ("  model ", "dim"), model_words(plan),
        ("  ", "dim"), spec.hardware.strategy, ("  ", "dim"), spec.precision.name,
    )  # fmt: skip
    load = f"{work.width}x{work.height} px, batch {work.batch}, {steps_words(plan)}, guidance {work.guidance_scale:g}"
    blocks: list[RenderableType] = [head, Text(load + _seconds_and_exactness(plan), style="dim"), _runtime_line(plan)]
    blocks += [Text(line, style="dim") for line in [overlap_words(plan)] if line]
    blocks += _replica_lines(plan, unicode)
    if "cpu" in plan.device_map.values():
        blocks += [Text(f"CPU    {human_bytes(host_memory())} of memory", style="bold"), *_component_lines(plan, "cpu")]
    if plan.slots:
        blocks.append(_legend(plan, unicode))
    blocks += [Text(f"knob {knob_sentence(plan, knob)}", style="cyan") for knob in plan.knobs]
    blocks += [Text(faster_sentence(one), style="cyan") for one in plan.faster]
    blocks += _transfer_lines(plan)
    blocks += _considered_lines(plan)
    blocks += [line for remark in plan.diagnostics if remark.type != CHOSEN
               for line in _remark_lines(remark)]  # fmt: skip
    return Group(*blocks)


def _replica_lines(plan: Plan, unicode: bool) -> Iterator[RenderableType]:
    """Each GPU with what is on it; of replicas that are alike, the components of the first."""
    each = plan.each()
    for group in alike(each):
        if plan.replicas:
            rate = each[group[0]].images_per_second
            drawn = "" if rate is None else f", ~{rate:.3g} images/s{' each' if len(group) > 1 else ''}"
            yield Text(f"replica{'s' if len(group) > 1 else ''} {numbers_words(group)}{drawn}", style="dim")
        for number in group:
            for slot in each[number].slots:
                yield _slot_line(slot, unicode)
                if number == group[0]:
                    yield from _component_lines(each[number], slot.index)


def _runtime_line(plan: Plan) -> Text:
    """How the denoising loop executes; where that was chosen, with the reason."""
    chosen = [remark.message for remark in plan.diagnostics if remark.type == CHOSEN]
    return Text(": ".join([runtime_words(plan), *(one.partition(": ")[2] for one in chosen)]), style="dim")


def _seconds_and_exactness(plan: Plan) -> str:
    seconds, replicas = plan.estimates.seconds_per_image, replicas_words(plan)
    words = [] if seconds is None else [f"~{seconds:.2f} s per image"]
    words += [plan.exactness] if plan.exactness else []
    return "".join(f"; {one}" for one in (replicas, ", ".join(words)) if one)


def _legend(plan: Plan, unicode: bool) -> Text:
    """What the bars are drawn with; others only where they take any."""
    others = any(slot.others_bytes for slot in plan.all_slots)
    parts = [pair for pair in zip(_GLYPHS if unicode else _LETTERS, _PARTS, strict=True)
             if others or pair[1] != OTHERS_WORDS]  # fmt: skip
    return Text(" ".join(f"{glyph} {word}" for glyph, word in parts) + "; ~ estimated", style="dim")


def _slot_line(slot: Slot, unicode: bool) -> Text:
    sizes = (slot.weights_bytes, slot.activation_bytes, slot.overhead_bytes, slot.others_bytes)
    line = Text.assemble((f"GPU {slot.index}  ", "bold"), bar(sizes, slot.capacity_bytes, unicode))
    taken = taken_words(slot.peak_bytes, slot.others_bytes, slot.capacity_bytes, slot.fullness)
    words = f"~{taken} in {slot.peak_phase}{pool_words(slot)}"
    return line.append(f"  {words}  {slot.gpu.removeprefix('NVIDIA ').removeprefix('GeForce ')}")


def _component_lines(plan: Plan, place: Place) -> list[RenderableType]:
    lines: list[RenderableType] = []
    longest = max(len(str(part.format)) for part in plan.components.values())
    home = plan.pipeline.denoiser if len({part.slot for part in plan.parts.values()}) > 1 else None
    for name, part in plan.parts.items():
        if part.slot == place:
            label = f"{name} (home)" if name == home else name
            needs = f"{human_bytes(part.weights_bytes):>10} weights  ~{human_bytes(part.activation_bytes)} activations"
            lines.append(Text(f"  {label:<18} {part.format!s:<{longest}} {needs}"))
    return lines


def _transfer_lines(plan: Plan) -> list[RenderableType]:
    if not plan.transfers:
        return [Text("moves between devices: nothing", style="dim")]
    grouped: dict[tuple[Place, Place], list[Transfer]] = defaultdict(list)
    for transfer in plan.transfers:
        grouped[transfer.src, transfer.dst].append(transfer)
    lines: list[RenderableType] = []
    for (src, dst), moved in grouped.items():
        step, image = sum(t.bytes_per_step for t in moved), sum(t.bytes_per_image for t in moved)
        each = f"~{human_bytes(step)} per step, " if step else ""
        lines.append(Text(f"moves {place_words(src)} -> {place_words(dst)}: {each}~{human_bytes(image)} per image"))
    return lines


def _considered_lines(plan: Plan) -> list[RenderableType]:
    """How many placements there were, the runner-up, and what was rejected for which reason."""
    if not plan.considered.placements:
        return []
    lines: list[RenderableType] = [Text(considered_sentence(plan))]
    for runner in plan.considered.runners_up[:1]:
        knobs = f", {', '.join(runner.knobs)}" if runner.knobs else ""
        full = "" if runner.fullness is None else f": fullest {runner.fullness:.0%}"
        words = f"  next: {groups_words({**runner.device_map, **runner.units})}{full}{knobs}"
        lines.append(Text(words, style="dim"))
    if plan.rejections:
        counts = ", ".join(rejection_words(row) for row in plan.rejections)
        lines.append(Text(f"  rejected {counts}", style="dim"))
    return lines


def _remark_lines(remark: Diagnostic) -> list[RenderableType]:
    style = "yellow" if remark.severity == "warning" else "cyan"
    label = "warning" if remark.severity == "warning" else "note"
    where = f"{remark.where}: " if remark.where else ""
    lines: list[RenderableType] = [Text.assemble((f"{label}: ", style), f"{where}{remark.message}")]
    if remark.hint:
        lines.append(Text(f"hint: {remark.hint}"))
    return lines


def show_plan(plan: Plan) -> None:
    """Print a plan to stderr."""
    out = console()
    out.print(render_plan(plan, unicode="utf" in (out.encoding or "").lower()))


def show_resolved(resolved: ResolvedPlan) -> None:
    """Print what each unit was bound to, and the drift."""
    out = console()
    for number, one in enumerate((resolved, *resolved.others)):
        devices = {**one.device_map, **one.unit_devices}
        places = ", ".join(f"{name} {device}" for name, device in devices.items())
        out.print(Text(f"resolved{f', replica {number}' if resolved.others else ''}: {places}"))
    for remark in resolved.drift:
        out.print(Group(*_remark_lines(remark)))


def show_error(problem: SanaDeployError) -> None:
    """Print one error: the sentence with its key, then the hint."""
    _print_error(problem.message, problem.where, problem.hint)


def _print_error(message: str, where: str, hint: str) -> None:
    out = console()
    before = f"{where}: " if where else ""
    out.print(Text.assemble(("error: ", "bold red"), f"{before}{message}"), soft_wrap=True)
    if hint:
        out.print(Text(f"hint: {hint}"), soft_wrap=True)


def _seconds_sentence(measured: Measured) -> str:
    """Seconds of every phase; loading with its rate; images per second of several replicas."""
    words = {phase: f"{phase} {value:.2f}" for phase, value in measured.seconds.items()}
    if measured.loaded_bytes and measured.seconds.get("load"):
        words["load"] += f" ({measured.loaded_bytes / measured.seconds['load'] / 1e9:.1f} GB/s)"
    rate = f"; {measured.images_per_second:.3g} images/s" if measured.images_per_second else ""
    return f"seconds: {', '.join(words.values())}{rate}"


def show_outcome(outcome: Outcome, spec: DeploySpec, folder: Path) -> None:
    """Print how the run ended, what was saved, and the command that comes next."""
    out = console()
    if outcome.error:
        _print_error(outcome.error.message, outcome.error.where, outcome.error.hint)
    for remark in outcome.diagnostics:
        out.print(Group(*_remark_lines(remark)))
    if outcome.measured.seconds:
        out.print(Text(_seconds_sentence(outcome.measured)))
    if outcome.rehearsal:
        out.print(render_rehearsal(outcome.rehearsal))
    else:
        _show_measured(out, outcome.measured)
    if outcome.audit:
        out.print(render_audit(outcome.audit))
    shown = _relative(folder)
    saved = [*outcome.images, *(["plan.json", "report.html"] if outcome.plan_digest else []), "outcome.json"]
    out.print(Text(f"saved in {shown}: {', '.join(saved)}"), soft_wrap=True)
    if outcome.status == "done":
        out.print(Text("next: " + next_command(spec, shown), style="green"), soft_wrap=True)


def _show_measured(out: Console, measured: Measured) -> None:
    for device, peak in measured.peak_bytes.items():
        out.print(Text(f"measured peak on {device}: {human_bytes(peak)}"))
    for pair, moved in measured.bytes_moved.items():
        out.print(
            Text(f"moved {pair}: {human_bytes(moved)}, {human_bytes(measured.bytes_per_step.get(pair, 0))} per step")
        )


def render_rehearsal(rehearsal: Rehearsal) -> RenderableType:
    """Render a rehearsal: the peak of each GPU beside the plan's, and what moved; report.html has the phases."""
    steps = f"{rehearsal.steps_rehearsed} of {rehearsal.steps} steps"
    if rehearsal.replicas > 1:
        steps += f"; {rehearsal.replicas_rehearsed} of {rehearsal.replicas} replicas"
        steps += ", the others are alike" if rehearsal.replicas_rehearsed < rehearsal.replicas else ""
    blocks: list[RenderableType] = [Text(f"rehearsed in {rehearsal.fidelity}, {steps}", style="bold")]
    for gpu in rehearsal.gpus:
        peak = taken_words(gpu.peak_bytes, gpu.others_bytes, gpu.capacity_bytes, gpu.fullness)
        blocks.append(
            Text(f"  {gpu.device}: peak {peak} in {gpu.component}, {gpu.phase}; planned {gpu.planned_error:+.1%}")
        )
    moved: dict[tuple[str, str], int] = defaultdict(int)
    for one in rehearsal.transfers:
        moved[one.src, one.dst] += one.bytes_per_step
    each = ", ".join(f"{src} -> {dst} {human_bytes(step)}" for (src, dst), step in moved.items() if step)
    if each:
        blocks.append(Text(f"  moved per step: {each}"))
    return Group(*blocks)


def render_audit(audit: Audit) -> RenderableType:
    """Render an audit: error per border, then the image."""
    table = Table(box=None, pad_edge=True, header_style="dim")
    for title in ("component", "phase", "dtype"):
        table.add_column(title)
    table.add_column("relative error", justify="right")
    for row in audit.borders:
        table.add_row(row.component, row.phase, row.dtype, f"{row.relative_error:.2e}" if row.relative_error else "0")
    return Group(Text(""), Text("audited against float32", style="bold"), table, Text(f"image: {image_words(audit)}"))


def show_brief(outcome: Outcome) -> None:
    """Print one line for one job of a sweep; the summary has the rest."""
    seconds = outcome.measured.seconds.get("generate")
    took = f" in {seconds:.2f} s" if seconds is not None else ""
    why = f": {outcome.error.message}" if outcome.error else ""
    style = {"done": "green", "infeasible": "yellow"}.get(outcome.status, "red")
    console().print(Text.assemble(("     ", ""), (outcome.status, style), f"{took}{why}"), soft_wrap=True)


def next_command(spec: DeploySpec, folder: str) -> str:
    """Return the command that takes this run one step further."""
    command = f"python -m sana_deploy plan_file={shlex.quote(f'{folder}/plan.json')}"
    return command if spec.until != "generate" else f'{command} workload.prompt="a red fox in the snow"'


def _relative(folder: Path) -> str:
    with contextlib.suppress(ValueError):
        return folder.resolve().relative_to(Path.cwd()).as_posix()
    return str(folder)
