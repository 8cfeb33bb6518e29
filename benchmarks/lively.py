"""Whether pictures can prove anything: equal flat pictures are equal whatever was computed."""

from __future__ import annotations

import torch

LEAST_DEVIATION = 0.05
LEAST_CONTROL = 0.01


def liveliness(pixels: torch.Tensor, uncontrolled: torch.Tensor) -> dict[str, float]:
    """Tell how lively a picture is, and how far the ControlNet moves it.

    Args:
        pixels: (batch, 3, height, width) in 0..1.
        uncontrolled: the same request with a conditioning scale of 0.

    Returns:
        `deviation`: the standard deviation within a channel, in the mean; `control`: the mean absolute difference.

    Raises:
        AssertionError: the picture is nearly flat, or nearly the same without the ControlNet.
    """
    deviation = float(pixels.float().std((2, 3)).mean())
    control = float((pixels.float() - uncontrolled.float().to(pixels.device)).abs().mean())
    assert deviation >= LEAST_DEVIATION, f"the picture is nearly flat: standard deviation {deviation:.4f}"
    assert control >= LEAST_CONTROL, f"the ControlNet hardly changes the picture: {control:.4f}"
    return {"deviation": deviation, "control": control}
