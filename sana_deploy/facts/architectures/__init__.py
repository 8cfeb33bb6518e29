"""What each architecture stores: tensor names and shapes worked out from a config alone, without torch.

Tests compare them with diffusers' and transformers' own modules. Beside them lie the facts of published modules, which
`catalogue.py` writes, and what components need, which `rehearsal/calibrate.py` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..architectures import dc_ae, gemma2, sana
from .layers import Shapes, UnknownArchitectureError

_KNOWN = {
    "Gemma2Model": (gemma2.DEFAULTS, gemma2.text_encoder),
    "AutoencoderDC": (dc_ae.DEFAULTS, dc_ae.autoencoder),
    "SanaTransformer2DModel": (sana.TRANSFORMER_DEFAULTS, sana.transformer),
    "SanaControlNetModel": (sana.CONTROLNET_DEFAULTS, sana.controlnet),
}


def expected_shapes(class_name: str, config: Mapping[str, Any]) -> Shapes | None:
    """Return the tensors that a checkpoint of this class must hold, as `state_dict` names them.

    None where the config does not determine them: a key or a value is not known here, or storage is packed (quantised).
    """
    defaults, shapes_of = _KNOWN[class_name]
    given = {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
    if class_name == "Gemma2Model":  # a config of transformers holds many keys that no tensor depends on
        unknown = [key for key in gemma2.OTHER_STORAGE if key in given]
    else:
        unknown = [key for key in given if key not in defaults]
        given = {key: value for key, value in config.items() if key in defaults}
    if unknown:
        return None
    try:
        return shapes_of({**defaults, **given})
    except (UnknownArchitectureError, ArithmeticError, LookupError, TypeError, ValueError):
        return None
