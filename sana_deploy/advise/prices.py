"""Price tables: our own, which ships with dates and sources, SkyPilot's catalogue and gpuhunt's. Nothing is fetched."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import chain
from pathlib import Path

from ..errors import InputError
from ..facts.virtual_machine import MOST_GPUS
from .gpu_names import known_gpu

SHIPPED = Path(__file__).parent / "prices.csv"
WHERE = "advise.prices"
_GIB_IN_MIB = 1024


@dataclass(frozen=True)
class Price:
    """What one machine costs.

    Attributes:
        gpu: as its table spells it; `word` is that of `machine.gpus`, None for a GPU that is not known.
        gpu_memory_gb: of one GPU as it is sold; None where the table is silent.
        usd_per_hour: of the whole machine.
        spot: whether the provider may take the machine away at any time.
        source: where the price was read.
    """

    provider: str
    instance: str
    gpu: str
    gpu_count: int
    gpu_memory_gb: float | None
    usd_per_hour: float
    region: str
    spot: bool
    date: date
    source: str

    @property
    def word(self) -> str | None:
        """The GPU in the words of `machine.gpus`."""
        return known_gpu(self.gpu, self.gpu_memory_gb)

    @property
    def gpus(self) -> str:
        """The machine in the words of `machine.gpus`, e.g. `8xh100`."""
        return f"{self.gpu_count}x{self.word}"

    @property
    def name(self) -> str:
        """How people read it: provider, instance and whether it is at a spot price."""
        return f"{self.provider} {self.instance}{' (spot)' if self.spot else ''}"


@dataclass(frozen=True)
class PriceTable:
    """Prices of machines that can be planned for, each kind of machine of a provider once, at its cheapest.

    Attributes:
        rows: read from the file.
        unknown: GPUs that cannot be planned for, with the number of their rows.
    """

    file: Path
    prices: list[Price]
    rows: int
    unknown: dict[str, int]

    @property
    def dates(self) -> str:
        """`2026-01-19`, or `2026-01-19 to 2026-09-26` where rows are of several days."""
        days = sorted({one.date for one in self.prices})
        return " to ".join(str(day) for day in dict.fromkeys((days[0], days[-1])))


def read_prices(path: str | None = None, spot: bool = False) -> PriceTable:
    """Read a price table.

    Args:
        path: of a CSV file with a line of titles; None takes the one that ships.
        spot: whether machines at spot prices count.

    Raises:
        InputError: it cannot be read, or a value in it makes no sense, with its line and column.
    """
    file = Path(path).expanduser() if path else SHIPPED
    found = _rows(file)
    usable: list[Price] = []
    unknown: dict[str, int] = {}
    for one in found:
        if one.word is None or one.gpu_count > MOST_GPUS:
            unknown[one.gpu] = unknown.get(one.gpu, 0) + 1
        elif spot or not one.spot:
            usable.append(one)
    if not usable:
        why = "has no machine with a known GPU" if unknown or not found else "has spot prices only"
        hint = (
            "advise.spot=true counts those" if found and not unknown else "a known GPU is one of machine.gpus, e.g. T4"
        )
        raise InputError(f"{file} {why}", where=WHERE, hint=hint)
    return PriceTable(file, _cheapest(usable), len(found), unknown)


def _cheapest(prices: Sequence[Price]) -> list[Price]:
    """Each kind of machine of a provider once: catalogues list it for every region and zone."""
    best: dict[tuple[str, str, bool, str], Price] = {}
    for one in prices:
        key = one.provider, one.instance, one.spot, one.gpus
        if key not in best or one.usd_per_hour < best[key].usd_per_hour:
            best[key] = one
    return list(best.values())


def _rows(file: Path) -> list[Price]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise InputError(f"{file} is not UTF-8: byte {problem.start}", where=WHERE, hint="save it as UTF-8") from None
    except OSError as problem:
        why = "there is no such file" if isinstance(problem, FileNotFoundError) else problem.strerror
        raise InputError(f"{file} cannot be read: {why}", where=WHERE, hint="name a CSV file, or null") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        (_, titles), *lines = ((reader.line_num, values) for values in chain(reader, [[]]))
    except csv.Error as problem:
        raise InputError(f"{file}, line {reader.line_num}: {problem}", where=WHERE, hint=_FORMS_HINT) from None
    form = next((one for one in FORMS if one.needed <= set(titles)), None)
    if form is None:
        nearest = max(FORMS, key=lambda one: len(one.needed & set(titles)))
        lacks = ", ".join(sorted(nearest.needed - set(titles)))
        raise InputError(f"{file}, line 1: the columns of {nearest.name} are not there, it lacks {lacks}",
                         where=WHERE, hint=_FORMS_HINT)  # fmt: skip
    day = datetime.fromtimestamp(file.stat().st_mtime, UTC).date()
    found = []
    for number, values in lines:
        if not any(values):
            continue
        line = Line(file, number, dict(zip(titles, values, strict=False)), day)
        if len(values) != len(titles):
            line.refuse(f"{len(values)} values for {len(titles)} columns")
        found += form.read(line)
    return found


@dataclass(frozen=True)
class Line:
    """One line of a table: its number, and values by column; `day` is when the file was written."""

    file: Path
    number: int
    values: Mapping[str, str]
    day: date

    def refuse(self, why: str, column: str = "") -> None:
        """Raise the error that names file, line and column."""
        at = f", column {column}" if column else ""
        raise InputError(f"{self.file}, line {self.number}{at}: {why}", where=WHERE, hint="correct it, or leave it out")

    def number_of(self, column: str, least: float = 0) -> float:
        """A number above `least`."""
        text = self.values[column].strip()
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least < value < float("inf"):
            self.refuse(f"a number above {least:g} is needed, got {text!r}", column)
        return value

    def count_of(self, column: str) -> int:
        """A whole number from 1."""
        value = self.number_of(column)
        if value != int(value):
            self.refuse(f"a whole number is needed, got {self.values[column]!r}", column)
        return int(value)

    def flag_of(self, column: str) -> bool:
        """Yes or no."""
        text = self.values[column].strip().lower()
        if text not in ("yes", "no", "true", "false"):
            self.refuse(f"yes or no is needed, got {text!r}", column)
        return text in ("yes", "true")

    def text_of(self, column: str) -> str:
        """A text that is not empty."""
        if not (text := self.values[column].strip()):
            self.refuse("a value is needed", column)
        return text


def _own(line: Line) -> list[Price]:
    day = line.text_of("date")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
        line.refuse(f"a day reads 2026-01-31, got {day!r}", "date")
    try:
        read_on = date.fromisoformat(day)
    except ValueError:
        line.refuse(f"there is no day {day}", "date")
    memory = line.number_of("gpu_memory_gb")
    return [
        Price(
            line.text_of("provider"), line.text_of("instance"), line.text_of("gpu"), line.count_of("gpu_count"), memory,
            line.number_of("usd_per_hour"), line.values["region"].strip(), line.flag_of("spot"), read_on,
            line.text_of("source"),
        )
    ]  # fmt: skip


def _provider_of(file: Path) -> str:
    """Catalogues name the provider by their path: `lambda/vms.csv`, `lambdalabs.csv`."""
    return file.absolute().parent.name if file.stem == "vms" else file.stem


_SIZED_TOGETHER = "vast"
"""The provider in whose catalogue SizeInMiB is that of all GPUs."""


def _skypilot(line: Line) -> list[Price]:
    if not line.values["AcceleratorName"].strip():
        return []  # a machine without a GPU
    if not line.values["InstanceType"].strip():
        return []  # the price of a GPU alone, whose host has a line of its own (GCP)
    count = line.number_of("AcceleratorCount")
    if count != int(count):
        return []  # a share of a GPU
    sized = re.search(r"'?\"?SizeInMiB'?\"?\s*:\s*(\d+)", line.values.get("GpuInfo", ""))
    memory = float(sized[1]) / _GIB_IN_MIB if sized and float(sized[1]) > _GIB_IN_MIB else None
    if memory and _provider_of(line.file) == _SIZED_TOGETHER:
        memory /= count
    columns = ((False, "Price"), (True, "SpotPrice"))
    prices = {spot: column for spot, column in columns if (line.values.get(column) or "").strip().strip("0.")}
    instance = line.text_of("InstanceType")
    where, source = line.values.get("Region", "").strip(), f"{line.file}, line {line.number}"
    return [
        Price(_provider_of(line.file), instance, line.text_of("AcceleratorName"), int(count), memory,
              line.number_of(column), where, spot, line.day, source)
        for spot, column in prices.items()
    ]  # fmt: skip


def _gpuhunt(line: Line) -> list[Price]:
    if not line.values["gpu_name"].strip() or line.values["gpu_count"].strip() in ("", "0"):
        return []  # a machine without a GPU
    memory = line.number_of("gpu_memory") if line.values.get("gpu_memory", "").strip() else None
    provider = line.values.get("provider", "").strip() or _provider_of(line.file)
    source = f"{line.file}, line {line.number}"
    return [
        Price(provider, line.text_of("instance_name"), line.text_of("gpu_name"), line.count_of("gpu_count"), memory,
              line.number_of("price"), line.values["location"].strip(), line.flag_of("spot"), line.day, source)
    ]  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One form of table: its columns that must be there, and how a line is read."""

    name: str
    needed: frozenset[str]
    read: Callable[[Line], list[Price]]


_OWN = "provider instance gpu gpu_count gpu_memory_gb usd_per_hour region spot date source"
_SKYPILOT = "InstanceType AcceleratorName AcceleratorCount Price"
_GPUHUNT = "instance_name location price gpu_count gpu_name spot"
FORMS = (
    Form("our own form", frozenset(_OWN.split()), _own),
    Form("SkyPilot's catalogue", frozenset(_SKYPILOT.split()), _skypilot),
    Form("gpuhunt's catalogue", frozenset(_GPUHUNT.split()), _gpuhunt),
)
_FORMS_HINT = f"ours are {_OWN.replace(' ', ',')}; columns of SkyPilot's catalogue and of gpuhunt's are read too"
