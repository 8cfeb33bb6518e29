"""What the text encoder gets of a prompt: diffusers cuts what is longer than `max_sequence_length` without a word."""

from __future__ import annotations

import inspect
from typing import Any

from .._models import Diagnostic
from ..declare.pipelines import DEFAULT, PIPELINES
from ..declare.workload import Request


def cut_prompts(pipeline: Any, request: Request) -> list[Diagnostic]:
    """Warn of a prompt, and of a negative prompt where guidance uses it, that is longer than diffusers takes.

    Args:
        pipeline: a loaded pipeline; its tokenizer counts.
    """
    defaults = inspect.signature(type(pipeline).__call__).parameters
    instruction = "\n".join(defaults["complex_human_instruction"].default)
    most = int(defaults["max_sequence_length"].default)
    # As `_get_gemma_prompt_embeds` counts: the instruction goes before the prompt and has its own tokens beside `most`.
    found = [_cut(pipeline, "prompt", request.prompt, instruction, most - 2)]
    if request.guided and "negative_prompt" in PIPELINES.get(type(pipeline).__name__, DEFAULT).reads:
        found.append(_cut(pipeline, "negative_prompt", request.negative_prompt, "", most - 1))
    return [remark for remark in found if remark]


def _cut(pipeline: Any, key: str, text: str, before: str, kept: int) -> Diagnostic | None:
    """Compare the tokens of `text` behind `before` with the `kept` ones; the token of the start is not counted."""
    (prepared,) = pipeline._text_preprocessing([text], clean_caption=False)
    start = len(pipeline.tokenizer.encode(before))
    tokens = pipeline.tokenizer.encode(before + prepared)[start:]
    if len(tokens) <= kept:
        return None
    message = (
        f"it has {len(tokens)} tokens and {kept} reach the text encoder: the last {len(tokens) - kept} change nothing"
    )
    hint = "shorten it, or put first what matters most"
    return Diagnostic(type="prompt_cut", severity="warning", message=message, where=f"workload.{key}", hint=hint)
