"""The shipped activation functions agree with rehearsals at points that they were not fitted to."""

from __future__ import annotations

import pytest

from sana_deploy import catalogue
from sana_deploy.checkpoint import open_checkpoint
from sana_deploy.compose import compose_spec
from sana_deploy.fit import MODELS, POINTS, peaks
from sana_deploy.profile import profile_pipeline
from sana_deploy.spec import COMPONENTS, Dtype

ELSEWHERE: list[tuple[int, int, float]] = [(2048, 1, 4.5), (768, 3, 4.5), (1024, 1, 1.0)]


@pytest.mark.parametrize(("side", "batch", "guidance"), ELSEWHERE)
@pytest.mark.parametrize(
    ("model", "dtype"),
    [("tiny", "float32"), ("sana_600m_controlnet", "bfloat16"), ("sana_1600m_controlnet", "float16")],
)
def test_fitted_peaks_are_within_2_percent_elsewhere(
    tiny: object, model: str, dtype: Dtype, side: int, batch: int, guidance: float
) -> None:
    assert (side, batch) not in POINTS or guidance <= 1
    request = [f"workload.height={side}", f"workload.width={side}", f"workload.batch={batch}"]
    spec = compose_spec([f"model={model}", *request, f"workload.guidance_scale={guidance}"])
    profile = profile_pipeline(open_checkpoint(spec.model), spec.workload, dict.fromkeys(COMPONENTS, dtype))
    assert profile.rough == ()
    for (name, phase), rehearsed in peaks(model, dtype, side, batch, guidance).items():
        part = profile.components[name]
        estimated = part.weights_bytes + part.activations[phase]
        assert estimated == pytest.approx(part.weights_bytes + rehearsed, rel=0.02), (name, phase)


def test_every_shipped_architecture_has_its_fits(tiny: object) -> None:
    for model in MODELS:
        for name, facts in open_checkpoint(compose_spec([f"model={model}"]).model).components.items():
            assert facts.shapes_digest in catalogue.fitted(), (model, name)
