"""A stream aside: small work of one request on a GPU where another one denoises, which it would else wait for.

What a request does on the denoiser's GPU while it encodes elsewhere (the prompt's tokens, the control image, copies of
both) is on a stream of its own. On the GPU's own stream each of its copies would wait for all that was given to it.

Memory that is freed there is used anew there, in the order of that stream. So what is made aside must not be freed
while the GPU's own stream still reads it: it lives to the end of its request, and the loop's own tensors are not made
aside (`overlap.py` begins a stage before its tensors are made).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Aside(Protocol):
    """Where the calling thread's work on one device goes."""

    def enter(self) -> None:
        """Have it go aside from now on."""

    def leave(self) -> None:
        """Have it go to the device's own stream again."""

    def synchronize(self) -> None:
        """Wait until what went aside is done."""


class CudaAside:
    """A stream of a GPU besides its default one. PyTorch keeps the current stream of each device by thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def enter(self) -> None:
        """Make the stream the current one; see `Aside`."""
        self._use(self.stream)

    def leave(self) -> None:
        """Make the default stream the current one; see `Aside`."""
        self._use(torch.cuda.default_stream(self.device))

    def synchronize(self) -> None:
        """Wait for the stream; see `Aside`."""
        self.stream.synchronize()

    def _use(self, stream: Any) -> None:
        with torch.cuda.device(self.device):  # or setting a stream would change the thread's device
            torch.cuda.set_stream(stream)
