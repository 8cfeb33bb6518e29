"""What people see of a ranking, on stderr: machines, why others are not among them, and the commands of the first."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ..declare.advising import Goal
from ..declare.spec import DeploySpec
from ..report.wording import PICTURE
from .prices import PriceTable
from .ranking import Advice, Ranking, cost_words

_NUMBERS = {"s/image": 9, "images/h": 10, "USD/h": 8, "USD/1000": 10}
"""Titles and widths of what is ranked; USD/1000 are for 1,000 images."""
_NUMBER_CELLS, _NAME_CELLS, _MOST_NAME_CELLS = 5, 24, 40


def show(
    out: Console, ranking: Ranking, table: PriceTable, spec: DeploySpec, goals: Sequence[Goal],
    given: Sequence[str], most: int,
) -> None:  # fmt: skip
    """Print the ranking.

    Args:
        given: the overrides of the declaration.
        most: rows of each table.
    """
    asked, work = ", ".join(map(str, goals)), spec.workload
    for line in _head(table):
        _print(out, Text(line, style="dim"))
    size = f"{work.width}x{work.height} px, batch {work.batch}"
    _print(out, Text(f"goals: {asked or 'none, all machines are ranked'}; {size}", style="dim"))
    if ranking.meeting:
        _rows(out, ranking.meeting[:most])
        _more(out, len(ranking.meeting) - most)
        _commands(out, ranking.meeting[0], given)
    else:
        words = "no machine meets the goals" if ranking.missing else "nothing fits on any of these machines"
        _print(out, Text(words, style="yellow"))
    if ranking.missing:
        _print(out, Text("misses a goal, the nearest first:", style="yellow"))
        for one in ranking.missing[:most]:
            _print(out, Text(f"  {one.price.name} ({one.price.gpus}) {' and '.join(one.misses)}"))
        _more(out, len(ranking.missing) - most)
    if ranking.unfit:
        _print(out, Text("does not fit:", style="yellow"))
        for price, reason in ranking.unfit[:most]:
            _print(out, Text(f"  {price.name} ({price.gpus}): {reason}"))
        _more(out, len(ranking.unfit) - most)


def _head(table: PriceTable) -> list[str]:
    """When and where prices were read, and what of the table cannot be planned for."""
    lines = [f"prices of {table.dates} in USD, from {table.file.name}; ask the provider what it takes today"]
    if table.unknown:
        names = sorted(table.unknown, key=lambda name: -table.unknown[name])
        more = ", ..." if len(names) > 5 else ""
        lines.append(
            f"{sum(table.unknown.values())} rows have GPUs that are not known here: {', '.join(names[:5])}{more}"
        )
    return lines


def _rows(out: Console, judged: Sequence[Advice]) -> None:
    """Two lines for each machine: what it does and costs, and the plan."""
    cells = max(_NAME_CELLS, min(_MOST_NAME_CELLS, out.width - sum(_NUMBERS.values()) - _NUMBER_CELLS))
    head = "".join(title.rjust(width) for title, width in _NUMBERS.items())
    _print(out, Text(f"{'':{_NUMBER_CELLS}}{'machine':{cells}}{head}", style="dim"))
    for number, one in enumerate(judged, 1):
        option, name = one.option, one.price.name
        name = name if len(name) <= cells else f"{name[: cells - 2]}.."
        values = (option.seconds, option.images_per_hour, one.price.usd_per_hour, one.usd_per_1000_images)
        numbers = "".join(
            cost_words(value).rjust(width) for value, width in zip(values, _NUMBERS.values(), strict=True)
        )
        _print(out, Text.assemble((f"{number:>3}  ", "bold"), (f"{name:{cells}}", "bold"), numbers))
        full = option.plan.fullness
        fullest = "" if full is None else f", fullest GPU {full:.0%}"
        words = f"{one.price.gpus}: {option.words}; {option.exactness}{fullest}"
        _print(out, Text(f"{'':{_NUMBER_CELLS}}{words}", style="dim"))


def _commands(out: Console, first: Advice, given: Sequence[str]) -> None:
    """Where the price of the first machine was read, and what draws and rehearses there."""
    price = first.price
    _print(out, Text(f"1: {price.name}, {first.option.words} ({PICTURE[first.option.exactness]})", style="bold"))
    _print(out, Text(f"  {price.usd_per_hour:g} USD per hour, read on {price.date}: {price.source}"))
    if first.rehearsed:
        _print(out, Text(f"  rehearsed: {first.rehearsed['words']}"))
    _print(out, Text(f"  rehearse: {first.rehearsal(given)}", style="green"))
    _print(out, Text(f"  run it there: {first.command(given)}", style="green"))


def _more(out: Console, count: int) -> None:
    if count > 0:
        _print(out, Text(f"  {count} more: advise.show=NUMBER, or output=json", style="dim"))


def _print(out: Console, line: Text) -> None:
    out.print(line, soft_wrap=True)
