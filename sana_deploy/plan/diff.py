"""Compares two plans: what moved, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._units import human_bytes
from .artifact import Plan
from .records import Place, Replica, place_words


@dataclass(frozen=True)
class Difference:
    """One value that differs: where it is in the plan, what it was and is; `kind` is declared, decided or cost."""

    kind: str
    where: str
    was: Any
    now: Any

    def words(self, value: Any) -> str:
        """What was, or is, as people read it."""
        if value is None or value == "":
            return "none"
        if self.kind == "cost":
            return human_bytes(value) if "bytes" in self.where else self._number(value)
        if self.where.endswith(".slot"):
            return place_words(value)
        return str(value)

    @property
    def change(self) -> str:
        """The change of bytes and seconds with its sign; empty for all else."""
        if self.kind != "cost" or self.was is None or self.now is None:
            return ""
        delta = self.now - self.was
        sign = "+" if delta > 0 else "-"
        return f"{sign}{human_bytes(abs(delta)) if 'bytes' in self.where else self._number(abs(delta))}"

    def _number(self, value: float) -> str:
        return f"{value:.3g}" if self.where == "images_per_second" else f"{value:.2f} s"


def compare(was: Plan, now: Plan) -> list[Difference]:
    """List what differs: declared (spec, checkpoint), decided (places, dtypes, knobs), cost (bytes, seconds)."""
    specs = [dict(_leaves(plan.spec.model_dump(mode="json"))) for plan in (was, now)]
    found = [
        Difference("declared", key, specs[0].get(key), specs[1].get(key))
        for key in sorted({*specs[0], *specs[1]})
        if specs[0].get(key) != specs[1].get(key)
    ]
    if was.checkpoint.fingerprint != now.checkpoint.fingerprint:
        found.append(Difference("declared", "checkpoint", was.checkpoint.fingerprint, now.checkpoint.fingerprint))
    if was.pipeline_class != now.pipeline_class:
        found.append(Difference("declared", "pipeline_class", was.pipeline_class, now.pipeline_class))
    files = [dict(_files(plan)) for plan in (was, now)]
    found += [
        Difference("declared", key, files[0].get(key), files[1].get(key))
        for key in sorted({*files[0], *files[1]})
        if files[0].get(key) != files[1].get(key)
    ]
    decided = [dict(_decisions(plan)) for plan in (was, now)]
    costs = [dict(_costs(plan)) for plan in (was, now)]
    for kind, (before, after) in (("decided", decided), ("cost", costs)):
        for key in [*before, *(key for key in after if key not in before)]:
            if before.get(key) != after.get(key):
                found.append(Difference(kind, key, before.get(key), after.get(key)))
    return found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif path not in ("until", "output", "plan_file"):
        yield path, value


def _files(plan: Plan) -> Iterator[tuple[str, str]]:
    for part, one in plan.checkpoint.content.items():
        for name, file in one.files.items():
            yield f"checkpoint.content.{part}/{name}", file.sampled


def _decisions(plan: Plan) -> Iterator[tuple[str, Any]]:
    yield "feasible", plan.feasible
    yield "replicas", len(plan.replicas) + 1
    for number, one in enumerate(plan.each()[1:], 1):
        yield f"replicas.{number}.device_map", _words({name: part.slot for name, part in one.parts.items()})
        yield f"replicas.{number}.runtime", one.runtime
        yield f"replicas.{number}.split", one.split
        yield f"replicas.{number}.knobs", ", ".join(one.knobs)
        yield f"replicas.{number}.vae_band_count", one.vae_band_count
        for key, value in _dealt(one):
            yield f"replicas.{number}.{key}", value
    for name, part in plan.components.items():
        yield f"components.{name}.slot", part.slot
        yield f"components.{name}.dtype", part.dtype
        yield f"components.{name}.quantization", part.quantization
    for name, unit in plan.units.items():
        yield f"units.{name}.slot", unit.slot
    yield "runtime", plan.runtime
    yield "split", plan.split
    yield from _dealt(plan)
    yield "knobs", ", ".join(plan.knobs)
    yield "vae_band_count", plan.vae_band_count


def _dealt(one: Replica) -> Iterator[tuple[str, str]]:
    """What of a plan or a replica is dealt how, and what is launched from graphs."""
    yield "rows", ", ".join(map(str, one.rows))
    yield "graphed_calls", ", ".join(one.graphed_calls)
    yield "layers", ", ".join(f"{name} {first}" for name, first in one.layers.items())


def _costs(plan: Plan) -> Iterator[tuple[str, Any]]:
    for slot in sorted(plan.all_slots, key=lambda slot: slot.index):
        yield f"slots.{slot.index}.peak_bytes", slot.peak_bytes
    for key in ("bytes_per_step", "bytes_per_image", "seconds_per_image"):
        yield f"estimates.{key}", getattr(plan.estimates, key)
    yield "images_per_second", plan.images_per_second


def _words(device_map: Mapping[str, Place]) -> str:
    return ", ".join(f"{name} {place_words(place)}" for name, place in device_map.items())


def render(differences: Sequence[Difference]) -> str:
    """One line per difference: key, was, is, and the change of bytes and seconds."""
    if not differences:
        return "no difference"
    lines = []
    for one in differences:
        change = f" ({one.change})" if one.change else ""
        lines.append(f"{one.kind:<9} {one.where}: {one.words(one.was)} -> {one.words(one.now)}{change}")
    return "\n".join(lines)
