"""The compiled artifact: `Plan`, which plan.json holds, saved, loaded and checked; and `ResolvedPlan`.

A plan is data. Loading one reads JSON, checks version, shape and digest, and runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .._files import write_text
from .._models import Diagnostic
from .._version import __version__
from ..declare.pipelines import PIPELINES, SANA_CONTROLNET, Component, PipelineDescription
from ..declare.spec import DeploySpec, Model
from ..errors import PlanError
from ..facts.libraries import library_versions
from ..facts.machine import Machine
from .basis import basis_of
from .bind import Binding, bind_slots, planned_machine, staleness_of
from .digest import digest_of
from .records import (
    CheckpointRecord,
    PlacedComponent,
    Replica,
    Slot,
    total_rate,
)
from .units import component_of

SCHEMA_VERSION = "1.5"
"""Minor: additive, readers ignore what they do not know. Major: refused, the upgrade is named."""


class Plan(Replica):
    """An explicit device and dtype for every component, with the reasons. See the module docstring.

    A plan that is not `feasible` shows the closest miss: it can be read, not applied. `units` are those beyond the
    first of their component, by name; `device_map` and `components` say where the first ones are. `runtime` is how the
    components of the denoising loop execute on GPUs. `split` is how one image is spread over GPUs: with `guidance` each
    component of the denoising loop has a unit 1, which computes the second half of the rows; with `rows` each has a
    unit on every GPU that takes part, for some rows of the image; with `layers` a component has a unit 1, which holds
    the blocks after the first ones that `layers` counts. `exactness` is what knobs, runtime and split do to
    the picture; None in plans of before 1.4. `faster` are other ways for the same request, the most exact first.
    `overlap` says how the stages of several requests overlap; None where that gains nothing or does not fit, and in
    plans of before 1.5.

    With several pipelines beside each other the keys of `Replica` are those of the first one, `replicas` are the
    others, and `images_per_second` is what all of them draw together; `each` gives one plan for each.
    """

    schema_version: str
    tool_version: str
    digest: str
    spec: DeploySpec
    checkpoint: CheckpointRecord
    basis: dict[str, str]
    feasible: bool = True
    libraries: dict[str, str] = {}
    pipeline_class: str = SANA_CONTROLNET.class_name
    replicas: list[Replica] = []
    images_per_second: float | None = None

    @property
    def pipeline(self) -> PipelineDescription:
        """Which pipeline the plan is for."""
        return PIPELINES[self.pipeline_class]

    @property
    def model(self) -> Model:
        """The declared model as one of the plan's pipeline, which earlier versions did not write beside it."""
        return self.spec.model.model_copy(update={"pipeline": self.pipeline_class})

    @property
    def parts(self) -> dict[str, PlacedComponent]:
        """Every unit by name, as a component of its place and bytes."""
        further = {
            name: self.components[unit.component].model_copy(update=unit.model_dump(exclude={"component"}))
            for name, unit in self.units.items()
        }
        return {**self.components, **further}

    @property
    def wholes(self) -> dict[Component, PlacedComponent]:
        """The components with all of their weights, also where their blocks are dealt to two units."""
        found = dict(self.components)
        for unit in self.units.values():
            if (name := unit.component) in self.layers:
                size = found[name].weights_bytes + unit.weights_bytes
                found[name] = found[name].model_copy(update={"weights_bytes": size})
        return found

    @property
    def fullness(self) -> float | None:
        """Share of the fullest GPU that is taken at its peak, by others and by the plan; None where all is on the CPU.

        This is what "fullest" means wherever people read it.
        """
        return max((slot.fullness for slot in self.all_slots), default=None)

    @property
    def _parts(self) -> tuple[Replica, ...]:
        """What says where each replica is: the plan itself for the first one."""
        return (self, *self.replicas)

    @property
    def all_slots(self) -> list[Slot]:
        """The slots of all replicas, the first one's first."""
        return [slot for one in self._parts for slot in one.slots]

    def each(self) -> list[Plan]:
        """A plan of its own for every replica, the first one first; this one where there is but one."""
        if not self.replicas:
            return [self]
        return [self._alone(one) for one in self._parts]

    def _alone(self, one: Plan | Replica) -> Plan:
        """The plan of one replica, without those beside it."""
        own = {name: getattr(one, name) for name in Replica.model_fields}
        rest: dict[str, Any] = {
            "replicas": [],
            "images_per_second": total_rate([one.estimates]),
            "basis": basis_of(own, []),
        }
        alone = self.model_copy(update={**own, **rest})
        return alone.model_copy(update={"digest": digest_of(alone.model_dump(mode="json"))})

    @classmethod
    def build(cls, **fields: Any) -> Plan:
        """Make a plan from its parts, adding version, basis and digest."""
        replicas: list[Replica] = fields.get("replicas") or []
        draft = cls(
            schema_version=SCHEMA_VERSION, tool_version=__version__, digest="",
            basis=basis_of(fields, [dict(one) for one in replicas]),
            libraries=library_versions(part.format for part in fields["components"].values()),
            images_per_second=total_rate([fields["estimates"], *(one.estimates for one in replicas)]), **fields,
        )  # fmt: skip
        return draft.model_copy(update={"digest": digest_of(draft.model_dump(mode="json"))})

    def to_json(self) -> str:
        """The text of plan.json: sorted keys, two-space indent, one newline at the end.

        A plan of an earlier version keeps to the keys that it came with, which its digest covers.
        """
        values = self.model_dump(mode="json", exclude_unset=self.schema_version != SCHEMA_VERSION)
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write plan.json under a temporary name, then rename it.

        Raises:
            InputError: the folder cannot be written.
        """
        return write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file and check version, shape and digest.

        Raises:
            PlanError: it is missing, damaged, changed by hand, or of another major version.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PlanError(f"there is no plan file {path}", where="plan_file") from None
        except (OSError, ValueError, RecursionError) as problem:
            raise PlanError(f"{path} is not readable JSON: {problem}", where="plan_file") from problem
        return cls.from_values(values, str(path))

    @classmethod
    def from_values(cls, values: Any, origin: str) -> Plan:
        """Check decoded JSON as `load` does; `origin` names it in messages."""
        version = values.get("schema_version") if isinstance(values, dict) else None
        if not isinstance(version, str):
            raise PlanError(f"{origin} is no plan file: it has no schema_version", where="plan_file")
        if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
            raise PlanError(
                f"{origin} has schema version {version}, this sana_deploy {__version__} reads {SCHEMA_VERSION}",
                where="plan_file",
                hint="compile the plan again with this version",
            )
        try:
            plan = cls.model_validate(values)
        except ValidationError as problem:
            first = problem.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise PlanError(f"{origin} is damaged at {key}: {first['msg']}", where="plan_file") from None
        if digest_of(values) != plan.digest:
            raise PlanError(
                f"{origin} was changed after it was compiled: its digest does not match its content",
                where="plan_file",
                hint="compile it again; change the declaration, not the plan",
            )
        plan.verify(origin)
        return plan

    def verify(self, origin: str = "the plan") -> None:
        """Check that the parts agree with each other.

        Raises:
            PlanError: naming the first contradiction.
        """
        if self.pipeline_class not in PIPELINES:
            known = f"this sana_deploy {__version__} knows {', '.join(PIPELINES)}"
            raise PlanError(f"{origin} is for a {self.pipeline_class}, {known}", where="plan_file")
        for one in self._parts:
            self._verify_places(one, origin)
        indices = [slot.index for slot in self.all_slots]
        if twice := [index for index in sorted(set(indices)) if indices.count(index) > 1]:
            raise PlanError(f"{origin} gives slot {twice[0]} to two replicas", where="plan_file")
        rate = total_rate([one.estimates for one in self._parts])
        if self.images_per_second not in (None, rate):
            was = f"{origin} says {self.images_per_second} images per second"
            raise PlanError(f"{was}, its replicas draw {rate}", where="plan_file")

    def _verify_places(self, one: Plan | Replica, origin: str) -> None:
        """Check that the parts of one replica agree with each other."""
        indices = {slot.index for slot in one.slots}
        for name in self.pipeline.names:
            place = one.device_map.get(name)
            part = one.components.get(name)
            if place is None or part is None or part.slot != place:
                raise PlanError(f"{origin} contradicts itself about the place of {name}", where="plan_file")
            if place != "cpu" and place not in indices:
                raise PlanError(f"{origin} puts {name} on slot {place}, which it lacks", where="plan_file")
        for name, unit in one.units.items():
            if unit.component not in self.pipeline.names or component_of(name) != unit.component:
                raise PlanError(f"{origin}: the unit {name} belongs to no component", where="plan_file")
            if unit.slot != "cpu" and unit.slot not in indices:
                raise PlanError(f"{origin} puts {name} on slot {unit.slot}, which it lacks", where="plan_file")
        dealt = {unit.component for unit in one.units.values()} if one.split == "layers" else set()
        if dealt != set(one.layers):
            raise PlanError(f"{origin} contradicts itself about what is dealt by layers", where="plan_file")
        if one.home != one.device_map[self.pipeline.denoiser]:
            raise PlanError(
                f"{origin}: home is {one.home}, the {self.pipeline.denoiser} is elsewhere", where="plan_file"
            )

    def check_feasible(self) -> None:
        """Refuse a plan that can be read, not applied.

        Raises:
            PlanError: it shows the closest miss.
        """
        if not self.feasible:
            raise PlanError(
                "this plan shows the closest miss of something that does not fit: it can be read, not applied",
                where="resolve",
                hint="compile it again with one of its hints, or with hardware=custom_map hardware.force=true",
            )

    def resolve(
        self,
        machine: Machine | None = None,
        allow: Sequence[str] | None = None,
        bind: Mapping[str, str] | None = None,
        verify: bool | None = None,
    ) -> ResolvedPlan:
        """Bind slots to the GPUs present.

        Args:
            machine: probed through torch unless given.
            allow: staleness to accept (`library_versions`, `checkpoint_content`); the declaration's unless given.
            bind: slot index -> GPU UUID; the declaration's unless given.
            verify: read every byte of the weights, where samples are compared else; the declaration's unless given.

        Raises:
            PlanError: a GPU is missing, smaller, busier or older than the plan needs, or a library or the checkpoint
                changed.
            InfeasibleError: a GPU of `bind` is not there.
        """
        self.check_feasible()
        spec, declared = self.spec, self.spec.resolve
        accepted, whole = declared.allow if allow is None else allow, declared.verify if verify is None else verify
        stale = staleness_of(self.libraries, self.checkpoint, self.wholes, self.model, accepted, whole)
        wanted = (declared.bind if bind is None else bind) or {}
        own = self.each()
        parts = [(one.slots, one.parts) for one in own]
        bound = bind_slots(parts, spec, machine or planned_machine(spec), wanted, stale)
        others = tuple(_resolved(plan, one, stale.allowed) for plan, one in zip(own[1:], bound[1:], strict=False))
        return replace(_resolved(self, bound[0], stale.allowed), others=others)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan bound to devices: `device_map` gives each component's torch device string, `slot_devices` each slot's.

    `home` is the device where the denoising loop lives; `unit_devices` are those of further units; `drift` lists
    differences that do no harm; `allowed` names the staleness that was accepted. With several replicas all this is the
    first one's, but for `drift`, and `others` are those beside it; `each` gives them all.
    """

    plan: Plan
    machine: Machine
    device_map: Mapping[Component, str]
    slot_devices: Mapping[int, str]
    home: str
    drift: tuple[Diagnostic, ...] = ()
    allowed: tuple[str, ...] = ()
    unit_devices: Mapping[str, str] = field(default_factory=dict)
    others: tuple[ResolvedPlan, ...] = ()

    def each(self) -> list[ResolvedPlan]:
        """Every replica, resolved, the first one first; this one where there is but one."""
        if not self.plan.replicas:
            return [self]
        return [replace(self, plan=self.plan.each()[0], others=()), *self.others]


def _resolved(plan: Plan, bound: Binding, allowed: tuple[str, ...]) -> ResolvedPlan:
    """One replica on its devices."""
    on_cpu = plan.slots and not bound.slot_devices  # for want of GPUs, where one unit of a component does it all
    devices = {name: bound.device_map[name] for name in plan.components}
    further = {} if on_cpu else {name: bound.device_map[name] for name in plan.units}
    places = devices, bound.slot_devices, bound.home
    return ResolvedPlan(plan, bound.machine, *places, bound.drift, allowed, further)
