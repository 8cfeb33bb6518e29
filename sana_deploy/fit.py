"""Fits activation peaks from rehearsals: `python -m sana_deploy.fit` writes them into the shipped architectures.

Every component sits on a virtual GPU of its own, in shapes, and the ledger tells its activation peak per phase. SANA's
parts are linear in batch x pixels, so that three points determine each function:

    bytes = constant + per_image x batch + per_image_pixel x batch x pixels

fitted apart with and without guidance, which doubles the batch everywhere but in decode. What waits on the
transformer's GPU (prompt embeddings, the control image, residuals) counts as the transformer's.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np

from .catalogue import FOLDER, NAMES
from .checkpoint import open_checkpoint
from .compile import compile_spec
from .compose import compose_spec
from .profile import PHASES, Phase
from .rehearsal import rehearse
from .spec import COMPONENTS, DTYPE_BYTES, Component, Dtype

POINTS = ((512, 1), (1024, 1), (1024, 2))
"""Side in pixels and batch of the rehearsals that are fitted."""
GUIDANCE = {"guided": 4.5, "unguided": 1.0}

MODELS = ("tiny", *NAMES)


def peaks(model: str, dtype: Dtype, side: int, batch: int, guidance: float) -> dict[tuple[Component, Phase], int]:
    """Rehearse one point with every component alone; return activation peaks in bytes by component and phase."""
    places = ", ".join(f"{name}: {index}" for index, name in enumerate(COMPONENTS))
    dtypes = [f"precision.components.{name}={dtype}" for name in COMPONENTS]
    spec = compose_spec(
        [f"model={model}", "machine=virtual", "machine.gpus=4x4000GiB", "machine.fidelity=shapes", *dtypes,
         "hardware=custom_map", f"hardware.device_map={{{places}}}", f"workload.guidance_scale={guidance}",
         f"workload.height={side}", f"workload.width={side}", f"workload.batch={batch}", "workload.steps=2"]
    )  # fmt: skip
    report = rehearse(compile_spec(spec)).report
    return {
        (name, phase): gpu.phase_activations[phase]
        for name, gpu in zip(COMPONENTS, report.gpus, strict=True)
        for phase in PHASES
        if gpu.phase_activations.get(phase)
    }


def fit(model: str) -> dict[str, Any]:
    """Solve the coefficients of every component, phase, dtype and guidance; see the module docstring."""
    components = open_checkpoint(compose_spec([f"model={model}"]).model).components
    fitted: dict[str, Any] = {
        name: {"shapes_digest": components[name].shapes_digest, "activations": {}} for name in COMPONENTS
    }
    terms = np.array([[1, batch, batch * side * side] for side, batch in POINTS], float)
    for dtype, (key, guidance) in itertools.product(DTYPE_BYTES, GUIDANCE.items()):
        measured = [peaks(model, dtype, side, batch, guidance) for side, batch in POINTS]
        for name, phase in measured[0]:
            solved = np.linalg.solve(terms, np.array([point[name, phase] for point in measured], float))
            by_phase = fitted[name]["activations"].setdefault(phase, {})
            by_phase.setdefault(dtype, {})[key] = [round(float(value), 6) for value in solved]
    return fitted


def main() -> None:
    """Fit every shipped architecture anew."""
    for path in FOLDER.glob("*.activations.json"):
        path.unlink()  # rules of thumb stand in while the fits are made anew
    for name in MODELS:
        text = json.dumps(fit(name), indent=1, sort_keys=True) + "\n"
        (FOLDER / f"{name}.activations.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
