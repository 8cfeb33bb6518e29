"""Drawings of several requests in one call of the pipeline: each is what its request draws alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_deploy import load_pipeline
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.declare.workload import Request
from sana_deploy.errors import UsageError
from sana_deploy.run.asked import Drawing
from sana_deploy.run.generate import generate

pytestmark = pytest.mark.usefixtures("short_prompts")
Small = Callable[..., DeploySpec]


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Any:
    return load_pipeline(compile_spec(compose_spec(["precision=fp32"])))


def edges(left: int) -> Image.Image:
    picture = Image.new("RGB", (96, 64))
    picture.paste("white", (left, 8, left + 24, 56))
    return picture


def drawing(prompt: str, seed: int, left: int, **content: Any) -> Drawing:
    request = Request(prompt=prompt, seed=seed, guidance_scale=4.5, **content)
    return Drawing(request, edges(left))


def test_a_drawing_alone_has_the_bits_of_its_request(pipeline: Any, small: Small, tmp_path: Path) -> None:
    path = tmp_path / "edges.png"
    edges(8).save(path)
    workload = small().workload.bounds
    one = drawing("a red fox", 3, 8)
    from_file = one.request.model_copy(update={"control_image": str(path)})
    (picture,), _ = generate(pipeline, workload, [one])
    assert picture.tobytes() == generate(pipeline, workload, from_file)[0][0].tobytes()


def test_drawings_of_one_call_are_those_of_their_own_requests_in_order(pipeline: Any, small: Small) -> None:
    workload = small().workload.bounds
    asked = [drawing("a red fox", 3, 8), drawing("a grey sea", 4, 40, negative_prompt="fog"), drawing("x", 3, 8)]
    alone = [np.asarray(generate(pipeline, workload, [one])[0][0], np.int16) for one in asked]
    together, _ = generate(pipeline, workload.model_copy(update={"batch": 3}), asked)
    apart = min(int(np.abs(one - other).max()) for i, one in enumerate(alone) for other in alone[:i])
    for one, picture in zip(alone, together, strict=True):
        assert np.abs(one - np.asarray(picture, np.int16)).max() <= 2 < apart, "of a level of 255"


def test_what_cannot_be_drawn_in_one_call_is_refused(pipeline: Any, small: Small) -> None:
    workload = small("workload.batch=2").workload.bounds
    one = drawing("a", 1, 8)
    with pytest.raises(UsageError, match="batch is 2, and 1 drawings"):
        generate(pipeline, workload, [one])
    with pytest.raises(UsageError, match="share guidance_scale and conditioning_scale"):
        generate(pipeline, workload, [one, drawing("b", 1, 8, conditioning_scale=0.5)])
