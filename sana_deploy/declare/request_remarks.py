"""What a person should know of the content of a request, as the pipeline takes it."""

from __future__ import annotations

from .._models import Diagnostic
from .control_image import check_control_image
from .pipelines import PIPELINES, PipelineDescription
from .workload import DeclaredWorkload, Request


def request_remarks(pipeline: PipelineDescription, asked: DeclaredWorkload) -> list[Diagnostic]:
    """Say what of a request changes nothing, what was done to its image, and where it has too many steps for the model.

    Raises:
        InputError: the image cannot be used; see `read_control_image`.
    """
    remarks = [*_unread(pipeline, asked), *_too_many_steps(pipeline, asked), *_unused_image(pipeline, asked)]
    return [*remarks, *(check_control_image(asked, asked.bounds) if pipeline.image else [])]


def _unread(pipeline: PipelineDescription, asked: DeclaredWorkload) -> list[Diagnostic]:
    """Name keys that were given a value and that this pipeline does not read."""
    others = dict.fromkeys(key for one in PIPELINES.values() for key in one.reads if key not in pipeline.reads)
    changed = [key for key in others if getattr(asked, key) != Request.model_fields[key].default]
    return [
        Diagnostic(
            type="unread",
            severity="warning",
            message=f"a {pipeline.title} does not read {key}: it changes nothing",
            where=f"workload.{key}",
        )
        for key in changed
    ]


def _too_many_steps(pipeline: PipelineDescription, asked: DeclaredWorkload) -> list[Diagnostic]:
    if pipeline.most_steps is None or asked.steps <= pipeline.most_steps:
        return []
    message = f"a {pipeline.title} is made for 1 to {pipeline.most_steps} steps, {asked.steps} are asked for"
    hint = f"workload.steps={pipeline.steps} is its own number"
    return [Diagnostic(type="many_steps", severity="warning", message=message, where="workload.steps", hint=hint)]


def _unused_image(pipeline: PipelineDescription, asked: DeclaredWorkload) -> list[Diagnostic]:
    """Say where a pipeline that starts from an image starts from noise alone, since all of its steps run."""
    if "strength" not in pipeline.reads or pipeline.steps_run(asked.bounds) < asked.steps:
        return []
    message = (
        f"with strength {asked.strength:g} all {asked.steps} steps run, from noise alone: the image changes nothing"
    )
    less = int(100 * (asked.steps - 1) / asked.steps) / 100
    hint = f"workload.strength={less:g} runs {asked.steps - 1} of them" if asked.steps > 1 else "workload.steps=2"
    return [Diagnostic(type="unused_image", severity="warning", message=message, where="workload.strength", hint=hint)]
