"""SANA's pipelines without a ControlNet behind the images API: images where they are read, refusals where not."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import numpy as np
import pytest
from family import planned
from PIL import Image
from serving import Running, running
from sleeping import Sleeping

from sana_deploy import load_pipeline
from sana_deploy.run.generate import generate
from sana_deploy.serve.replica import PipelineReplica

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
RED = Image.new("RGB", (96, 64), "red")


def png(picture: Image.Image = RED) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


@contextmanager
def served(model: str, replica: Any = None, *more: str) -> Iterator[Running]:
    """A service of a tiny model on the CPU, over a replica that sleeps unless one is given."""
    resolved = planned(model, "precision=fp32", *more).resolve()
    with running(resolved, replica(resolved) if replica else Sleeping(0.001)) as service:
        yield service


def post(api: Running, path: str, body: dict[str, Any], file: bytes | None = None) -> httpx2.Response:
    if file is None:
        return httpx2.post(f"{api.url}{path}", json=body, timeout=60)
    fields = {key: str(value) for key, value in body.items()}
    return httpx2.post(f"{api.url}{path}", data=fields, files={"image": ("a.png", file, "image/png")}, timeout=60)


def sent(answer: httpx2.Response) -> Image.Image:
    """The first picture of an answer."""
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))


def test_a_pipeline_without_an_image_draws_from_the_prompt_and_refuses_one() -> None:
    with served("tiny_sana") as api:
        answer = post(api, GENERATIONS, {"prompt": "fox", "negative_prompt": "fog", "seed": 3})
        assert answer.status_code == 200, answer.text
        drawn: Any = sent(answer)
        facts = json.loads(drawn.text["sana_deploy"])
        assert facts["request"] == {
            "prompt": "fox", "negative_prompt": "fog", "size": "96x64", "steps": 20, "guidance_scale": 4.5
        }  # fmt: skip
        refusals = [
            (post(api, EDITS, {"prompt": "fox"}, png()), "takes no image; POST /v1/images/generations", "image"),
            (post(api, GENERATIONS, {"prompt": "x", "control_image": text(png())}), "takes no control_image",
             "control_image"),
            (post(api, GENERATIONS, {"prompt": "x", "conditioning_scale": 1.0}), "takes no conditioning_scale",
             "conditioning_scale"),
            (post(api, GENERATIONS, {"prompt": "x", "strength": 0.5}), "takes no strength", "strength"),
        ]  # fmt: skip
        for refused, says, param in refusals:
            assert refused.status_code == 400
            assert says in refused.json()["error"]["message"]
            assert refused.json()["error"]["param"] == param
        (model,) = httpx2.get(f"{api.url}/v1/models").json()["data"]
        assert (model["pipeline"], model["image"]) == ("SanaPipeline", None)


def test_a_pipeline_that_starts_from_an_image_draws_edits_and_needs_one() -> None:
    with served("tiny_sprint_img2img") as api:
        refused = post(api, GENERATIONS, {"prompt": "fox"})
        assert refused.status_code == 400
        assert "starts from an image: send the file image to POST /v1/images/edits" in refused.text
        drawn = post(api, EDITS, {"prompt": "fox", "strength": 0.5}, png())
        assert drawn.status_code == 200, drawn.text
        encoded = post(api, GENERATIONS, {"prompt": "fox", "strength": 0.5, "control_image": text(png())})
        assert encoded.status_code == 200, encoded.text
        refused = post(api, EDITS, {"prompt": "fox", "negative_prompt": "fog"}, png())
        assert "takes no negative_prompt" in refused.json()["error"]["message"]
        (model,) = httpx2.get(f"{api.url}/v1/models").json()["data"]
        assert model["image"] == {"title": "image", "optional": False}
        assert (model["steps"], model["pipeline"]) == (2, "SanaSprintImg2ImgPipeline")


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("model", ["tiny_pag", "tiny_sprint_img2img"])
def test_the_service_draws_what_the_pipeline_draws(model: str) -> None:
    own = {"tiny_pag": {"pag_scale": 2.0}, "tiny_sprint_img2img": {"strength": 0.5}}[model]
    file = png() if model == "tiny_sprint_img2img" else None
    with served(model, PipelineReplica, "workload.steps=2") as api:
        answer = post(api, EDITS if file else GENERATIONS, {"prompt": "a fox", "seed": 5, **own}, file)
        assert answer.status_code == 200, answer.text
        plan = api.service.plan
    from sana_deploy.run.asked import Drawing

    work = plan.spec.workload.model_copy(update={"prompt": "a fox", "seed": 5, **own})
    (alone,), _ = generate(load_pipeline(plan), work.bounds, [Drawing(work.request, RED if file else None)])
    assert np.array_equal(np.asarray(sent(answer)), np.asarray(alone))


def test_guidance_of_a_sprint_changes_no_shape_so_that_any_is_drawn() -> None:
    with served("tiny_sprint") as api:
        for scale in (0.0, 1.0, 9.0):
            answer = post(api, GENERATIONS, {"prompt": "fox", "guidance_scale": scale})
            assert answer.status_code == 200, answer.text
