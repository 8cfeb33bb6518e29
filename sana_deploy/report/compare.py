"""The command `diff`: two plans compared, in lines, as JSON, or side by side in a page that loads nothing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .._files import write_text
from .._units import human_bytes
from .._version import __version__
from ..declare.pipelines import PHASES
from ..errors import SanaDeployError
from ..plan.artifact import Plan
from ..plan.diff import Difference, compare, render
from ..plan.records import Place, place_words
from .drawings import bar_rows, legend, memory_bar, ordered_parts
from .notes import notes_of, number
from .pages import template
from .terminal import console
from .wording import PICTURE, model_words

Row = tuple[Any, ...]
MANY = 10
"""From this factor on a change is said in times, not in percent."""
_KINDS = {"declared": "What was declared", "decided": "What was decided", "cost": "What it costs"}


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0, with `--exit-code` 1 if places, dtypes or knobs differ, or an error's own code."""
    parser = argparse.ArgumentParser(prog="sana-deploy diff", description="Compare two plan files.")
    parser.add_argument("was")
    parser.add_argument("now")
    parser.add_argument("--json", action="store_true", help="print the differences as JSON on stdout")
    parser.add_argument("--html", metavar="FILE", help="write a page that shows both side by side")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 if places, dtypes or knobs differ")
    options = parser.parse_args(arguments)
    try:
        was, now = Plan.load(options.was), Plan.load(options.now)
        differences = compare(was, now)
        if options.html:
            write_text(Path(options.html), compare_page(was, now, (options.was, options.now)), "--html")
            console().print(f"saved: {options.html}", soft_wrap=True)
    except SanaDeployError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    print(json.dumps([asdict(one) for one in differences]) if options.json else render(differences))
    return int(options.exit_code and any(one.kind == "decided" for one in differences))


def compare_page(was: Plan, now: Plan, names: tuple[str, str]) -> str:
    """Render two plans side by side.

    Args:
        names: how each is called, e.g. the file that it came from.
    """
    found = compare(was, now)
    bars = [[memory_bar(one, slot) for one in plan.each() for slot in one.slots] for plan in (was, now)]
    return template("compare").render(
        title="Two plans side by side",
        version=__version__,
        plans=[_side(plan, name, label, own)
               for plan, name, label, own in zip((was, now), names, ("before", "after"), bars, strict=True)],
        counts=", ".join(f"{sum(one.kind == kind for one in found)} {kind}" for kind in _KINDS) if found else "",
        glance=list(_glance(was, now)),
        legend=list(dict.fromkeys([*legend(was), *legend(now)])),
        bar_rows=[*bar_rows(bars[0], "before, "), *bar_rows(bars[1], "after, ")],
        phases=_phases(was, now),
        components=list(_components(was, now)),
        moves=list(_moves(was, now)),
        differences=[(words, kind == "cost", [_line(one) for one in found if one.kind == kind])
                     for kind, words in _KINDS.items()],
        sure={**notes_of(was), **notes_of(now)},
    )  # fmt: skip


def _side(plan: Plan, name: str, label: str, bars: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "label": label,
        "name": name,
        "title": f"{model_words(plan)}, {plan.spec.hardware.strategy}, {plan.spec.precision.name}",
        "digest": plan.digest[7:19],
        "feasible": plan.feasible,
        "gpus": bars,
    }


def _pair(was: str, now: str) -> Markup | str:
    """One text where both are the same; else both, told apart by words, a line through the first and an arrow."""
    if was == now:
        return was
    changed = (
        '<span class="changed"><span class="sr">was </span><del>{}</del> <span aria-hidden="true">→</span>'
        '<span class="sr">, is </span> <ins>{}</ins></span>'
    )
    return Markup(changed).format(was or "none", now or "none")


def _change(was: float | None, now: float | None, unit: str) -> str:
    """The change of a number, with its sign and percent; `same` where there is none."""
    if was is None or now is None:
        return "" if was is now else "not comparable"
    if was == now:
        return "same"
    delta = now - was
    size = human_bytes(round(abs(delta))) if unit == "B" else f"{100 * abs(delta):.0f} points" if unit == "%" else (
        f"{abs(delta):.3g}{unit}")  # fmt: skip
    share = ""
    if was and unit != "%":
        share = f", {delta / was:+.0%}" if now / was < MANY else f", {now / was:.3g} times"
    return f"{'+' if delta > 0 else '-'}{size}{share}"


def _words(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "B":
        return f"~{human_bytes(round(value))}" if value else "0 B"
    return f"~{value:.0%}" if unit == "%" else f"~{value:.3g}{unit}"


def _glance(was: Plan, now: Plan) -> Iterator[Row]:
    """Figures of both: what, before, after, change, note."""
    numbers: tuple[tuple[str, Callable[[Plan], float | None], str, str], ...] = (
        ("seconds per image", lambda plan: plan.estimates.seconds_per_image, " s", "seconds"),
        ("images per second", lambda plan: plan.images_per_second, "", "seconds"),
        ("fullest GPU", lambda plan: plan.fullness, "%", "peak"),
        ("moved per step", lambda plan: plan.estimates.bytes_per_step, "B", "moved"),
        ("moved per image", lambda plan: plan.estimates.bytes_per_image, "B", "moved"),
    )
    for label, get, unit, note in numbers:
        yield label, _words(get(was), unit), _words(get(now), unit), _change(get(was), get(now), unit), note
    texts: tuple[tuple[str, Callable[[Plan], str]], ...] = (
        ("pixels", lambda plan: f"{plan.exactness}: {PICTURE[plan.exactness]}" if plan.exactness else ""),
        ("runtime", lambda plan: plan.runtime),
        ("split", lambda plan: plan.split),
        ("knobs", lambda plan: ", ".join(plan.knobs) or "none"),
        ("precision", lambda plan: plan.spec.precision.name),
        ("GPUs", lambda plan: str(len(plan.all_slots))),
        ("replicas", lambda plan: str(len(plan.replicas) + 1)),
        ("fits", lambda plan: "yes" if plan.feasible else "no"),
    )
    for label, text in texts:
        before, after = text(was), text(now)
        yield label, before, after, "same" if before == after else "changed", ""


def _phases(was: Plan, now: Plan) -> list[dict[str, Any]]:
    """Seconds of each phase of both, with the length of each bar in percent of the longest."""
    seconds = [plan.estimates.seconds for plan in (was, now)]
    longest = max([*seconds[0].values(), *seconds[1].values(), 0.0]) or 1.0
    return [
        {"name": name, "change": _change(seconds[0].get(name), seconds[1].get(name), " s"),
         "bars": [{"label": label, "percent": round(100 * own.get(name, 0.0) / longest, 2),
                   "words": f"~{own[name]:.2f} s" if name in own else "none"}
                  for label, own in zip(("before", "after"), seconds, strict=True)]}
        for name in PHASES
        if name in seconds[0] or name in seconds[1]
    ]  # fmt: skip


def _components(was: Plan, now: Plan) -> Iterator[Row]:
    for name in dict.fromkeys([*ordered_parts(was), *ordered_parts(now)]):
        texts = []
        for plan in (was, now):
            part = plan.parts.get(name)
            texts.append((place_words(part.slot), str(part.format), human_bytes(part.weights_bytes),
                          f"~{human_bytes(part.activation_bytes)}") if part else ("",) * 4)  # fmt: skip
        yield name, *(_pair(before, after) for before, after in zip(*texts, strict=True))


def _moves(was: Plan, now: Plan) -> Iterator[Row]:
    """Tensors that move in either: from, to, tensor, and bytes per step and per image."""
    moved: list[dict[tuple[Place, Place, str], tuple[int, int]]] = [
        {(one.src, one.dst, one.tensor): (one.bytes_per_step, one.bytes_per_image) for one in plan.transfers}
        for plan in (was, now)
    ]
    for key in dict.fromkeys([*moved[0], *moved[1]]):
        (step, image), (later_step, later_image) = (one.get(key, (0, 0)) for one in moved)
        way = f"{place_words(key[0])} to {place_words(key[1])}"
        yield key[2], way, _pair(_size(step), _size(later_step)), _pair(_size(image), _size(later_image))


def _size(size: int) -> str:
    return f"~{human_bytes(size)}" if size else "nothing"


def _line(one: Difference) -> Row:
    words = _pair(one.words(one.was), one.words(one.now))
    if one.kind != "cost":
        return one.where, words
    note = "peak" if "peak" in one.where else "moved" if "bytes" in one.where else "seconds"
    return one.where, Markup('<span data-note="{}">{}</span>').format(note, words), number(one.change, note, False)
