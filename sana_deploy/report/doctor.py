"""The command `doctor`: what this machine has, what a plan would use, what is missing and what helps."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from .._units import human_bytes
from .._version import __version__
from ..errors import UsageError
from ..facts.machine import Gpu
from ..plan.records import place_words
from .checkup import Checkup, Compile, Problem, examine, extra_hint
from .terminal import CHOSEN
from .wording import runtime_words


def main(arguments: Sequence[str], compile_plan: Compile) -> int:
    """Run the command; 0 where a plan could run, 1 where something that it needs is missing or broken.

    Raises:
        UsageError, ComposeError, InvalidSpecError: an override is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="sana-deploy doctor",
        description="Tell what this machine has, what a plan would use, and what is missing. Ends with 1 where "
        "something that a plan needs is missing or broken.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what to plan for, as of a run; "
                        "output=json prints one JSON document")  # fmt: skip
    parser.add_argument("--imports", action="store_true", help="import torch, transformers and diffusers too: "
                        "some seconds more, and finds what is installed but broken")  # fmt: skip
    options = parser.parse_args(arguments)
    overrides: list[str] = options.overrides
    for one in overrides:
        if "=" not in one:
            raise UsageError(f"{one!r} is no override", where="doctor", hint="values read KEY=VALUE")
    found = examine([one for one in overrides if not one.startswith("output=")], compile_plan, options.imports)
    if "output=json" in overrides:
        sys.stdout.write(json.dumps(document(found), ensure_ascii=False) + "\n")
    else:
        out = Console(highlight=False)
        out.print(render(found, "utf" in (out.encoding or "").lower()), soft_wrap=True)
    return found.exit_code


def document(found: Checkup) -> dict[str, Any]:
    """The same for programs; sizes in bytes."""
    plan = found.plan
    return {
        "version": __version__,
        "python": found.python,
        "host_bytes": found.machine.host_bytes,
        "gpus": [asdict(gpu) for gpu in found.machine.gpus],
        "driver": asdict(found.driver),
        "torch_cuda": found.torch_cuda,
        "libraries": [asdict(one) for one in found.libraries],
        "extras": [asdict(one) for one in found.extras],
        "imported": asdict(found.imported) if found.imported else None,
        "folders": [asdict(one) for one in found.folders],
        "plan": {
            "overrides": list(found.asked),
            "precision": plan.spec.precision.name if plan else None,
            "runtime": plan.runtime if plan else None,
            "exactness": plan.exactness if plan else None,
            "device_map": dict(plan.device_map) if plan else None,
            "seconds_per_image": plan.estimates.seconds_per_image if plan else None,
        },
        "problems": [asdict(one) for one in found.problems],
        "exit_code": found.exit_code,
    }


def render(found: Checkup, unicode: bool = True) -> RenderableType:
    """Render a checkup: machine, libraries, folders, plan, then problems with what helps, and a verdict."""
    tick, cross, mark = ("✓", "✗", "!") if unicode else ("+", "x", "!")
    parts: list[RenderableType] = [Text(f"sana_deploy {__version__}, Python {found.python}", style="bold")]
    for title, lines in (
        ("GPUs", list(_gpu_lines(found))),
        ("Libraries", list(_library_lines(found, tick, cross))),
        ("Extras", list(_extra_lines(found, tick))),
        ("Folders", list(_folder_lines(found))),
        ("What a plan would use", list(_plan_lines(found))),
    ):
        parts += [Text(f"\n{title}", style="bold"), *map(_indented, lines)]
    if found.problems:
        lines = [line for one in found.problems for line in _problem_lines(one, cross, mark)]
        parts += [Text("\nTo mend", style="bold"), *map(_indented, lines)]
    return Group(*parts, Text(""), _verdict(found, tick, cross))


def _indented(line: Text) -> Text:
    return Text.assemble("  ", line)


def _gpu_lines(found: Checkup) -> Iterator[Text]:
    driver, gpus = found.driver, found.machine.gpus
    if driver.version:
        takes = f", takes CUDA {'.'.join(map(str, driver.cuda))}" if driver.cuda else ""
        build = f"; torch was built for CUDA {found.torch_cuda}" if found.torch_cuda else ""
        yield Text(f"driver {driver.version}{takes}{build}")
    if not gpus:
        yield Text("none: plans run on the CPU, or are rehearsed on GPUs you do not have (machine=2x8gb)")
    cards = {card.uuid: card for card in driver.cards}
    for gpu in gpus:
        yield _gpu_line(gpu)
        for one in cards[gpu.uuid].processes if gpu.uuid in cards else ():
            size = "" if one.bytes is None else f", {human_bytes(one.bytes)}"
            yield Text(f"       used by {one.name} (pid {one.pid}{size})", style="dim")
    index = {gpu.uuid: gpu.index for gpu in gpus}
    for link in driver.links:
        if set(link.between) <= set(index):
            access = {True: "peer access", False: "no peer access: copies go over the CPU", None: "peer access unknown"}
            first, second = (index[one] for one in link.between)
            yield Text(f"GPU {first} - GPU {second}: {link.way}, {access[link.peer]}", style="dim")
    yield Text(f"{human_bytes(found.machine.host_bytes)} of memory beside them", style="dim")


def _gpu_line(gpu: Gpu) -> Text:
    share = gpu.free_bytes / gpu.total_bytes if gpu.total_bytes else 0
    style = "green" if share > 0.75 else "yellow"
    return Text.assemble(
        (f"GPU {gpu.index}  ", "bold"), f"{gpu.name}, {human_bytes(gpu.total_bytes)}, ",
        (f"{human_bytes(gpu.free_bytes)} free", style),
        f", compute capability {gpu.capability[0]}.{gpu.capability[1]}",
    )  # fmt: skip


def _library_lines(found: Checkup, tick: str, cross: str) -> Iterator[Text]:
    """Libraries that are as they must be in one line, and one line for each of the others."""
    fine = [one for one in found.libraries if one.state == "fine"]
    if fine:
        names = ", ".join(f"{one.name}\0{one.version}" for one in fine)
        yield Text.assemble((f"{tick} ", "green"), f"{len(fine)} are within their ranges")
        for line in textwrap.wrap(names, 76, break_on_hyphens=False):
            yield Text(line.replace("\0", " "), style="dim")
    for one in found.libraries:
        if one.state != "fine":
            yield Text.assemble((f"{cross} ", "red"), f"{one.name} {one.version}, {one.wanted} is needed: {one.state}")
    if found.imported and not found.imported.failed:
        yield Text.assemble((f"{tick} ", "green"), "torch, transformers and diffusers can be imported")
    others = [f"{one.name} {one.version} ({one.tested})" for one in fine if one.tested not in ("", one.version)]
    if others:
        yield Text(f"other than tested: {', '.join(others)}", style="yellow")
    elif fine and any(one.tested for one in fine):
        yield Text("versions are those that tests run with", style="dim")


def _extra_lines(found: Checkup, tick: str) -> Iterator[Text]:
    here = [one.name for one in found.extras if not one.lacking]
    if here:
        yield Text.assemble((f"{tick} ", "green"), ", ".join(here))
    for one in found.extras:
        if one.lacking:
            yield Text.assemble("- ", (one.name, "bold"), f" is not here; it enables {one.enables}")
            yield Text(f"    {extra_hint(one)}", style="cyan")


def _folder_lines(found: Checkup) -> Iterator[Text]:
    for one in found.folders:
        sizes = f"{human_bytes(one.bytes)} in it, {human_bytes(one.free_bytes)} free on its disk"
        yield Text.assemble(one.path, (f"  {sizes}", "dim"))
        yield Text(f"    {one.holds} ({one.variable})", style="dim")


def _plan_lines(found: Checkup) -> Iterator[Text]:
    plan = found.plan
    if plan is None:
        yield Text(f"nothing: {' '.join(found.asked)} cannot be planned here")
        return
    seconds = plan.estimates.seconds_per_image
    took = "" if seconds is None else f", ~{seconds:.2f} s per image"
    yield Text(f"{' '.join(found.asked)}: precision {plan.spec.precision.name}, {runtime_words(plan)}{took}")
    yield Text(", ".join(f"{name} {place_words(part.slot)}" for name, part in plan.parts.items()))
    yield from (Text(one.message, style="dim") for one in plan.diagnostics if one.type in ("auto_precision", CHOSEN))


def _problem_lines(one: Problem, cross: str, mark: str) -> Iterator[Text]:
    yield Text.assemble((f"{cross if one.needed else mark} ", "red" if one.needed else "yellow"), one.message)
    if one.hint:
        yield Text(f"    {one.hint}", style="cyan")


def _verdict(found: Checkup, tick: str, cross: str) -> Text:
    if found.exit_code:
        count = sum(one.needed for one in found.problems)
        return Text(f"{cross} {count} thing{'s' if count > 1 else ''} to mend before a plan can run", style="bold red")
    rest = f"; {len(found.problems)} to look at" if found.problems else ""
    return Text(f"{tick} a plan can run here{rest}. Next: sana-deploy hardware=multi_gpu_balanced", style="bold green")
