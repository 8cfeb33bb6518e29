"""What people see: pure renderers of plans, outcomes and sweeps, on stderr. Nothing is decided here."""

from __future__ import annotations

import contextlib
import shlex
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .errors import SanaDeployError
from .machine import host_memory
from .outcome import Audit, Measured, Outcome, Rehearsal, RehearsedGpu
from .plan import Diagnostic, Place, Plan, Slot
from .units import human_bytes

if TYPE_CHECKING:
    from .resolve import ResolvedPlan
    from .spec import DeploySpec

BAR_CELLS = 24


def console() -> Console:
    """The console for people: stderr, soft-wrapped, honouring NO_COLOR and dumb terminals."""
    return Console(stderr=True, highlight=False)


def bar(parts: Iterable[tuple[int, str, str]], capacity: int, unicode: bool = True) -> Text:
    """Draw `capacity` as BAR_CELLS cells; each part is (bytes, style, ASCII letter), the rest is free."""
    text, filled = Text(), 0
    for size, style, letter in parts:
        end = min(BAR_CELLS, round((filled + size) / max(capacity, 1) * BAR_CELLS))
        start = min(BAR_CELLS, round(filled / max(capacity, 1) * BAR_CELLS))
        text.append(("█" if unicode else letter) * (end - start), style=style)
        filled += size
    text.append(("░" if unicode else ".") * (BAR_CELLS - len(text)), style="dim")
    return text


def render_plan(plan: Plan, unicode: bool = True) -> RenderableType:
    """Render a plan: one table per place, transfers, what was considered, remarks."""
    spec = plan.spec
    head = Text.assemble(
        ("plan ", "dim"), plan.digest[7:19], ("  model ", "dim"), plan.checkpoint.source,
        ("  hardware ", "dim"), spec.hardware.strategy, ("  precision ", "dim"), spec.precision.name,
    )  # fmt: skip
    work = spec.workload
    load = f"{work.width}x{work.height} px, batch {work.batch}, {work.steps} steps, guidance {work.guidance_scale:g}"
    blocks: list[RenderableType] = [head, Text(load, style="dim")]
    blocks += [_slot_table(plan, slot, unicode) for slot in plan.slots]
    if "cpu" in plan.device_map.values():
        blocks.append(_host_table(plan))
    blocks.append(Text("~ estimated; weights are exact", style="dim"))
    blocks += _knob_lines(plan)
    blocks += _transfer_lines(plan)
    blocks += _time_lines(plan)
    blocks += _considered_lines(plan)
    blocks += [line for remark in plan.diagnostics for line in _remark_lines(remark)]
    return Group(*blocks)


def _slot_table(plan: Plan, slot: Slot, unicode: bool) -> RenderableType:
    share = slot.peak_bytes / max(slot.capacity_bytes, 1)
    parts = [
        (slot.weights_bytes, "blue", "w"),
        (slot.activation_bytes, "magenta", "a"),
        (slot.overhead_bytes, "yellow", "o"),
    ]
    title = Text.assemble((f"GPU {slot.index}  {slot.gpu}  ", "bold"), bar(parts, slot.capacity_bytes, unicode))
    title.append(
        f"  ~{human_bytes(slot.peak_bytes)} of {human_bytes(slot.capacity_bytes)} ({share:.0%}) in {slot.peak_phase}"
    )
    table = _component_table(plan, slot.index)
    table.add_row("total", "", human_bytes(slot.weights_bytes), f"~{human_bytes(slot.activation_bytes)}", style="bold")
    note = Text(f"  + ~{human_bytes(slot.overhead_bytes)} context and headroom", style="dim")
    return Group(Text(""), title, table, note)


def _host_table(plan: Plan) -> RenderableType:
    table = _component_table(plan, "cpu")
    weights = sum(part.weights_bytes for part in plan.components.values() if part.slot == "cpu")
    table.add_row("total", "", human_bytes(weights), "", style="bold")
    return Group(Text(""), Text(f"CPU  {human_bytes(host_memory())} of memory", style="bold"), table)


def _component_table(plan: Plan, place: Place) -> Table:
    table = Table(box=None, pad_edge=True, header_style="dim")
    table.add_column("component", min_width=14)
    table.add_column("dtype", min_width=9)
    table.add_column("weights", justify="right", min_width=10)
    table.add_column("activations", justify="right", min_width=12)
    for name, part in plan.components.items():
        if part.slot == place:
            label = f"{name} (home)" if name == "transformer" and len(set(plan.device_map.values())) > 1 else name
            needs = human_bytes(part.weights_bytes), f"~{human_bytes(part.activation_bytes)}"
            table.add_row(label, str(part.format), *needs)
    return table


def _transfer_lines(plan: Plan) -> list[RenderableType]:
    if not plan.transfers:
        return [Text("moves between devices: nothing", style="dim")]
    grouped: dict[tuple[Place, Place], list[Any]] = defaultdict(list)
    for transfer in plan.transfers:
        grouped[transfer.src, transfer.dst].append(transfer)
    lines: list[RenderableType] = [Text("moves between devices")]
    for (src, dst), moved in grouped.items():
        step, image = sum(t.bytes_per_step for t in moved), sum(t.bytes_per_image for t in moved)
        names = ", ".join(t.tensor for t in moved)
        lines.append(Text(f"  {_place(src)} -> {_place(dst)}  ~{human_bytes(step)} per step, "
                          f"~{human_bytes(image)} per image  ({names})"))  # fmt: skip
    return lines


def _place(place: Place) -> str:
    return "CPU" if place == "cpu" else f"GPU {place}"


def _knob_lines(plan: Plan) -> list[RenderableType]:
    """One line per knob that is on: what it does, what it saves, what it costs."""
    lines: list[RenderableType] = []
    for knob in plan.knobs:
        price = plan.knob_prices.get(knob)
        line = f"knob {knob}: {_KNOB_WORDS.get(knob, '')}"
        if price:
            line += f"; saves ~{human_bytes(price.bytes_saved)}"
            line += f", moves ~{human_bytes(price.bytes_per_image)} per image" if price.bytes_per_image > 0 else ""
            line += f", costs ~{price.seconds_per_image:.2f} s per image" if price.seconds_per_image is not None else ""
        lines.append(Text(line, style="cyan"))
    return lines


_KNOB_WORDS = {
    "vae_slicing": "the VAE takes one image at a time",
    "split_controlnet": "ControlNet apart from the transformer",
    "text_encoder_offload": "the text encoder waits on the CPU, and is on its GPU only during encode",
    "vae_tiling": "the VAE takes tiles of 1024 px with stride 896; can change pixels",
}


def _time_lines(plan: Plan) -> list[RenderableType]:
    seconds = plan.estimates.seconds_per_image
    if seconds is None:
        return []
    phases = ", ".join(f"{phase} {value:.2f}" for phase, value in plan.estimates.seconds.items())
    return [Text(f"time ~{seconds:.2f} s per image ({phases})")]


def _considered_lines(plan: Plan) -> list[RenderableType]:
    seen = plan.considered
    if not seen.placements:
        return []
    under = f" under {seen.settings} sets of knobs" if seen.settings > 1 else ""
    lines: list[RenderableType] = [
        Text(
            f"considered {seen.placements} placements{under}: {seen.feasible} of {seen.placements * seen.settings} fit"
        )
    ]
    for runner in seen.runners_up:
        places = ", ".join(f"{name} {_place(place)}" for name, place in runner.device_map.items())
        knobs = f", {', '.join(runner.knobs)}" if runner.knobs else ""
        seconds = f", ~{runner.seconds_per_image:.2f} s" if runner.seconds_per_image is not None else ""
        lines.append(Text(f"  next: {places}: fullest {runner.worst_utilisation:.0%}{seconds}{knobs}", style="dim"))
    for row in plan.rejections:
        where = f" on GPU {row.gpu}" if row.gpu >= 0 else ""
        lines.append(Text(f"  rejected {row.count} for {row.reason}{where}; closest: {row.closest}", style="dim"))
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
    """Print what each component was bound to, and the drift."""
    out = console()
    places = ", ".join(f"{name} {device}" for name, device in resolved.device_map.items())
    out.print(Text(f"resolved: {places}"))
    for remark in resolved.drift:
        out.print(Group(*_remark_lines(remark)))


def show_error(problem: SanaDeployError) -> None:
    """Print one error: the sentence with its place, then the hint."""
    _print_error(problem.message, problem.where, problem.hint)


def _print_error(message: str, where: str, hint: str) -> None:
    out = console()
    place = f"{where}: " if where else ""
    out.print(Text.assemble(("error: ", "bold red"), f"{place}{message}"), soft_wrap=True)
    if hint:
        out.print(Text(f"hint: {hint}"), soft_wrap=True)


def show_outcome(outcome: Outcome, spec: DeploySpec, folder: Path) -> None:
    """Print how the run ended, what was saved, and the command that comes next."""
    out = console()
    if outcome.error:
        _print_error(outcome.error.message, outcome.error.where, outcome.error.hint)
    for remark in outcome.diagnostics:
        out.print(Group(*_remark_lines(remark)))
    seconds = outcome.measured.seconds
    if seconds:
        out.print(Text("seconds: " + ", ".join(f"{phase} {value:.2f}" for phase, value in seconds.items())))
    if outcome.rehearsal:
        out.print(render_rehearsal(outcome.rehearsal))
    else:
        _show_measured(out, outcome.measured)
    if outcome.audit:
        out.print(render_audit(outcome.audit))
    shown = _relative(folder)
    saved = [*(f"{shown}/{image}" for image in outcome.images), f"{shown}/outcome.json"]
    if outcome.plan_digest:
        saved.insert(len(saved) - 1, f"{shown}/plan.json")
    out.print(Text("saved: " + "\n       ".join(saved)), soft_wrap=True)
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
    """Render what a rehearsal told: peaks per GPU beside the plan's, phase by phase, traffic by tensor, work."""
    steps = f"{rehearsal.steps_rehearsed} of {rehearsal.steps} steps"
    blocks: list[RenderableType] = [Text(""), Text(f"rehearsed in {rehearsal.fidelity}, {steps}", style="bold")]
    for gpu in rehearsal.gpus:
        blocks += _rehearsed_gpu(gpu)
    if rehearsal.transfers:
        blocks.append(_rehearsed_transfers(rehearsal))
    parts = (f"{name} {work.flops / 1e12:.2f}" for name, work in rehearsal.work.items() if work.flops)
    blocks.append(Text(f"TFLOP in the steps rehearsed: {', '.join(parts)}", style="dim"))
    return Group(*blocks)


def _rehearsed_gpu(gpu: RehearsedGpu) -> list[RenderableType]:
    share = gpu.peak_bytes / gpu.capacity_bytes
    peak = f"{human_bytes(gpu.peak_bytes)} of {human_bytes(gpu.capacity_bytes)} ({share:.0%})"
    parts = (
        f"{human_bytes(gpu.weights_bytes)} weights + {human_bytes(gpu.activation_bytes)} activations"
        f" + {human_bytes(gpu.context_bytes)} context"
    )
    order = ("encode", "prepare", "denoise", "decode")
    phases = ", ".join(f"{phase} {human_bytes(gpu.phase_peaks[phase])}" for phase in order if phase in gpu.phase_peaks)
    return [
        Text(f"{gpu.device}  {gpu.gpu}: peak {peak}, in {gpu.component} during {gpu.phase}"),
        Text(f"  {parts}; the plan estimated {gpu.planned_error:+.1%}"),
        Text(f"  without context: {phases}", style="dim"),
    ]


def _rehearsed_transfers(rehearsal: Rehearsal) -> RenderableType:
    table = Table(box=None, pad_edge=True, header_style="dim")
    table.add_column("moved")
    table.add_column("tensor")
    table.add_column("per step", justify="right")
    table.add_column("per image", justify="right")
    for moved in rehearsal.transfers:
        amounts = (human_bytes(moved.bytes_per_step), human_bytes(moved.bytes_per_image))
        table.add_row(f"{moved.src} -> {moved.dst}", moved.tensor, *amounts)
    return table


def render_audit(audit: Audit) -> RenderableType:
    """Render an audit: error per border, then the image."""
    table = Table(box=None, pad_edge=True, header_style="dim")
    for title in ("component", "phase", "dtype"):
        table.add_column(title)
    table.add_column("relative error", justify="right")
    for row in audit.borders:
        table.add_row(row.component, row.phase, row.dtype, f"{row.relative_error:.2e}" if row.relative_error else "0")
    image = (
        "identical" if audit.identical else f"PSNR {audit.psnr:.1f} dB" if audit.psnr is not None else "not a number"
    )
    return Group(Text(""), Text("audited against float32", style="bold"), table, Text(f"image: {image}"))


def show_brief(outcome: Outcome, spec: DeploySpec, folder: Path) -> None:
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
