"""A request's prompt and seed: what reaches the model, and how a picture is drawn again."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from diffusers import SanaControlNetPipeline
from transformers import AutoTokenizer

from sana_deploy.declare.compose import compose_spec
from sana_deploy.errors import InvalidSpecError
from sana_deploy.run.prompts import cut_prompts

Run = Callable[..., subprocess.CompletedProcess[str]]


class TextEncoder:
    """Keeps the token ids that diffusers hands to the text encoder."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.dtype = torch.float32

    def __call__(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
        self.seen.append(ids[attention_mask.bool()])
        return [torch.zeros(*ids.shape, 4)]


@pytest.fixture
def encoding(tiny: Path) -> Any:
    """A pipeline that is good for `encode_prompt` alone."""
    pipeline = SanaControlNetPipeline.__new__(SanaControlNetPipeline)
    pipeline.__dict__.update(
        tokenizer=AutoTokenizer.from_pretrained(tiny / "tokenizer"), text_encoder=TextEncoder(), _internal_dict={}
    )
    return pipeline


def tokens(pipeline: Any, key: str, text: str, most: int) -> int:
    """Tokens that the text encoder gets of `text`, by diffusers' own code."""
    pipeline.text_encoder.seen.clear()
    parameters = inspect.signature(SanaControlNetPipeline.__call__).parameters
    instruction = parameters["complex_human_instruction"].default if key == "prompt" else []
    pipeline._get_gemma_prompt_embeds(
        text, "cpu", torch.float32, max_sequence_length=most, complex_human_instruction=instruction
    )
    (ids,) = pipeline.text_encoder.seen
    return len(ids) - len(pipeline.tokenizer.encode("\n".join(instruction)))


@pytest.mark.parametrize("key", ["prompt", "negative_prompt"])
def test_a_prompt_that_diffusers_cuts_is_a_warning_with_the_counts(encoding: Any, key: str) -> None:
    workload, warned = compose_spec(SMALL).workload, []
    for length in range(1, 700, 3):
        text = ("fox, " * length)[:length]
        total, kept = tokens(encoding, key, text, 5000), tokens(encoding, key, text, 300)
        remarks = cut_prompts(encoding, workload.model_copy(update={key: text}))
        assert bool(remarks) == (kept < total), text
        for remark in remarks:
            assert [int(n) for n in re.findall(r"\d+", remark.message)] == [total, kept, total - kept]
            assert (remark.severity, remark.where) == ("warning", f"workload.{key}")
        warned.append(bool(remarks))
    assert 0 < sum(warned) < len(warned)


def test_a_negative_prompt_that_nothing_uses_is_not_looked_at(encoding: Any) -> None:
    workload = compose_spec(SMALL).workload.model_copy(update={"negative_prompt": "fox " * 2000, "guidance_scale": 1.0})
    assert cut_prompts(encoding, workload) == []


@pytest.mark.usefixtures("short_prompts")
def test_a_drawn_seed_is_named_and_draws_the_picture_again(here: Run, tiny: Path, tmp_path: Path) -> None:
    work = [*SMALL, "workload.steps=1", f"workload.prompt={'a fox, ' * 400}"]
    first = here(*work, "workload.seed=random", "hydra.run.dir=first")
    assert first.returncode == 0, first.stderr
    outcome = json.loads((tmp_path / "first" / "outcome.json").read_text(encoding="utf-8"))
    plan = json.loads((tmp_path / "first" / "plan.json").read_text(encoding="utf-8"))
    assert outcome["seed"] == plan["spec"]["workload"]["seed"]
    types = {remark["type"]: remark for remark in outcome["diagnostics"]}
    assert "prompt_cut" in types
    again = types["seed_drawn"]["hint"].split()[0]
    assert again == f"workload.seed={outcome['seed']}"
    assert f"hint: {again} draws the same picture again" in first.stderr
    second = here("plan_file=first/plan.json", again, work[-1], "hydra.run.dir=second")
    assert second.returncode == 0, second.stderr
    pictures = [(tmp_path / name / "image-000.png").read_bytes() for name in ("first", "second")]
    assert pictures[0] == pictures[1]


def test_random_draws_anew_each_time_and_other_words_are_refused() -> None:
    assert len({compose_spec(["workload.seed=random"]).workload.seed for _ in range(3)}) == 3
    with pytest.raises(InvalidSpecError) as caught:
        compose_spec(["workload.seed=rondom"])
    assert caught.value.hint == "a whole number from 0, or random"
