"""The reference pages of the site, written from the models and registries of the package when the site is built.

`pages()` gives every page by its path below `docs/`; `files()` gives what is published beside them. Nothing is kept in
the repository, so that the reference cannot differ from the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from site_keys import MODELS, NOT_IN_A_GROUP, capital, comments, keys_of, model_of, options_of, words

import sana_deploy
from sana_deploy import errors
from sana_deploy._units import MIB
from sana_deploy.declare import spec
from sana_deploy.declare.compose import conf_dir
from sana_deploy.declare.hardware import SPLITS
from sana_deploy.declare.knobs import KNOBS
from sana_deploy.declare.pipelines import PIPELINES
from sana_deploy.declare.runtime import RUNTIMES
from sana_deploy.facts.known_gpus import KNOWN_GPUS
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.schema import plan_schema
from sana_deploy.run.outcome import Outcome


def pages() -> dict[str, str]:
    """Path below `docs/` -> Markdown, for every page that is generated."""
    return {
        "reference/groups.md": groups_page(),
        "reference/knobs.md": knobs_page(),
        "reference/exit_codes.md": exit_codes_page(),
        "reference/schemas.md": schemas_page(),
        "reference/gpus.md": gpus_page(),
        "reference/api.md": api_page(),
    }


def files() -> dict[str, str]:
    """Path below `docs/` -> content, for what is published beside the pages."""
    schemas = {"plan": plan_schema(), "outcome": Outcome.model_json_schema(mode="serialization")}
    return {f"reference/{name}.schema.json": json.dumps(one, indent=2) + "\n" for name, one in schemas.items()}


def table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """A table of Markdown; bars within a cell are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def groups_page() -> str:
    """Options of each group, then every key with type, bounds, default and sentence."""
    head = (
        "# Groups and keys\n\n`GROUP=OPTION` takes an option, `KEY=VALUE` sets one value. This page is written from "
        "the models that check a declaration and from the files of `conf/`.\n\nA default is that of the option as it "
        "is composed. `null` means that nothing is set.\n"
    )
    studies = table(["option", "what it is"], [[f"`experiment={n}`", t] for n, t in options_of("experiment").items()])
    parts = [*(group_part(group) for group in MODELS), f"## experiment\n\n{studies}", single_keys_part()]
    return "\n".join([head, *parts])


def group_part(group: str) -> str:
    """One group: its options, and the keys of each of its models."""
    parts = [f"## {group}\n"]
    if options := options_of(group):
        parts.append(table(["option", "what it is"], [[f"`{group}={name}`", text] for name, text in options.items()]))
    for option, model in MODELS[group].items():
        if len(MODELS[group]) > 1:
            also = [f"`{name}`" for name in options if model_of(group, name) is model and name != option]
            named = f"`{group}={option}`"
            parts.append(f"### Keys of {named}\n" if keys_of(group, option) else f"{named} has no keys.\n")
            parts += [f"{', '.join(also)} have the same keys.\n"] if also else []
        if rows := [[f"`{key.name}`", key.type, key.default, key.help] for key in keys_of(group, option)]:
            parts.append(table(["key", "type and bounds", "default", "what it says"], rows))
    return "\n".join(parts)


def single_keys_part() -> str:
    """Keys outside all groups."""
    values = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    said = comments("", "") | {"resume": comments("", "").get("sweep", "")}
    properties = spec.DeploySpec.model_json_schema()["properties"]
    rows = []
    for key in NOT_IN_A_GROUP:
        name = key.rpartition(".")[2]
        value = values["sweep"]["resume"] if key == "sweep.resume" else values[key]
        shape = words(properties[key]) if key in properties else "text or `null`"
        rows.append([f"`{key}`", shape, f"`{json.dumps(value)}`", said[name]])
    return f"## Keys outside the groups\n\n{table(['key', 'type', 'default', 'what it says'], rows)}"


def knobs_page() -> str:
    """The registries of what a planner may choose: knobs, runtimes, splits; and the pipelines."""
    knobs = [
        [f"`{one.name}`", capital(one.help), f"`{one.exactness}`", ", ".join(f"`{other}`" for other in one.excludes),
         "always, where it has something to do" if one.always else "only if asked for" if one.asked else "where needed"]
        for one in KNOBS.values()
    ]  # fmt: skip
    runtimes = [[f"`{name}`", capital(one.help), f"`{one.exactness}`"] for name, one in RUNTIMES.items()]
    splits = [[f"`{name}`", capital(one.help), f"`{one.exactness}`"] for name, one in SPLITS.items()]
    pipelines = [
        [f"`{name}`", ", ".join(f"`{part.name}`" for part in one.components), str(one.steps)]
        for name, one in PIPELINES.items()
    ]
    return "\n".join([
        "# Knobs, runtimes, splits, pipelines\n\nWritten from the registries. [Knobs](../knobs.md) has what each one "
        "costs, [exactness](../exactness.md) what the words mean.\n\n## Knobs, cheapest first\n",
        table(["knob", "what it does", "exactness", "excludes", "turned on"], knobs),
        "## Runtimes\n", table(["runtime", "what it does", "exactness"], runtimes),
        "## Splits\n", table(["split", "what it does", "exactness"], splits),
        "## Pipelines\n", table(["class of diffusers", "components", "own steps"], pipelines),
    ])  # fmt: skip


def error_classes() -> list[type[errors.SanaDeployError]]:
    """Every class of `sana_deploy.errors`, in its order."""
    found = (kind for kind in vars(errors).values() if isinstance(kind, type))
    return [kind for kind in found if issubclass(kind, errors.SanaDeployError)]


def exit_codes_page() -> str:
    """The codes of the command's help, each with the errors that end with it."""
    shown = (conf_dir() / "hydra" / "help" / "sana_deploy.yaml").read_text(encoding="utf-8")
    rows = []
    for code, meaning in re.findall(r"^ +(\d+)  (\w.*)$", shown.partition("Exit codes:")[2], re.MULTILINE):
        raised = [kind for kind in error_classes() if kind.exit_code == int(code)]
        said = "<br>".join(f"`{kind.__name__}`: {(kind.__doc__ or '').splitlines()[0]}" for kind in raised)
        rows.append([code, meaning, said])
    return (
        "# Exit codes\n\nThe command ends with one of these. From Python the errors are raised; all of them are in "
        f"`sana_deploy.errors`.\n\n{table(['code', 'meaning', 'errors'], rows)}\nA sweep exits with 0 when every job "
        "is done or infeasible, else with the worst job's code.\n"
    )


def schemas_page() -> str:
    """The keys of plan.json and outcome.json, and where their schemas are."""
    parts = ["# Files\n\nA minor version adds keys, and readers ignore what they do not know.\n"]
    for name, model in (("plan", Plan), ("outcome", Outcome)):
        schema = model.model_json_schema(mode="serialization")
        rows = [[f"`{key}`", shape_of(shape)] for key, shape in schema["properties"].items()]
        doc = (model.__doc__ or "").replace("See the module docstring.", "")
        parts += [
            f"## {name}.json\n\n{' '.join(doc.split())}\n\n"
            f"Its JSON Schema: [{name}.schema.json]({name}.schema.json).\n",
            table(["key", "type"], rows),
        ]
    return "\n".join(parts)


def shape_of(shape: Mapping[str, Any]) -> str:
    """A property of a record in words; records within it by their name in the schema."""
    if "$ref" in shape:
        return f"`{shape['$ref'].rpartition('/')[2]}`"
    if "anyOf" in shape:
        return " or ".join(dict.fromkeys(map(shape_of, shape["anyOf"])))
    if shape.get("type") == "array" and "items" in shape:
        return f"list of {shape_of(shape['items'])}"
    if shape.get("type") == "object" and isinstance(shape.get("additionalProperties"), Mapping):
        return f"name → {shape_of(shape['additionalProperties'])}"
    return words(shape)


def gpus_page() -> str:
    """Every GPU that a virtual machine can be made of."""
    rows = [
        [f"`{word}`", one.name, f"{one.memory_mib * MIB / 2**30:.2f}", ".".join(map(str, one.capability)),
         f"{one.tflops_float16:g}", f"{one.tflops_bfloat16:g}", f"{one.tflops_float32:g}", f"{one.memory_gbps:g}",
         f"{one.pcie_gbps:g}", f"{one.nvlink_gbps:g}", one.source]
        for word, one in KNOWN_GPUS.items()
    ]  # fmt: skip
    head = ["word", "GPU", "GiB", "capability", "float16", "bfloat16", "float32", "GB/s", "PCIe", "NVLink", "source"]
    return (
        f"# GPUs\n\n`machine.gpus` knows {len(rows)} GPUs by name. float16, bfloat16 and float32 are TFLOPS of dense "
        "matrix products (0: not native), PCIe and NVLink are GB/s in each direction.\n\n" + table(head, rows)
    )


def api_page() -> str:
    """The public names, for mkdocstrings."""
    names = [name for name in sana_deploy.__all__ if name != "__version__"]
    homes = [f"sana_deploy.{sana_deploy._HOMES[name]}.{name}" for name in names]
    listed = table(["name", "where it is"], [[f"[`{n}`][{h}]", f"`{h}`"] for n, h in zip(names, homes, strict=True)])
    parts = [f"# Python API\n\n`from sana_deploy import ...` gives these names.\n\n{listed}"]
    return "\n".join([*parts, *(f"::: {home}\n" for home in homes), "::: sana_deploy.errors\n"])
