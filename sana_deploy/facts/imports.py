"""Whether the heavy libraries can be imported, and which GPUs torch sees: asked of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

PATIENCE = 300
"""Seconds after which importing counts as failed."""
_SCRIPT = """
import json, sys
import torch, transformers, diffusers
known = torch.cuda.get_arch_list() if torch.cuda.is_available() else []
sys.stdout.write(json.dumps({"gpus": torch.cuda.device_count(), "architectures": known}))
"""


@dataclass(frozen=True)
class Imported:
    """What a process saw that imported torch, transformers and diffusers.

    `failed` is the last line of what went wrong, empty where nothing did; `architectures` are those that torch has
    kernels for (`sm_90`), empty where it sees no GPU.
    """

    failed: str = ""
    gpus: int = 0
    architectures: tuple[str, ...] = ()

    def has_kernels_for(self, capability: tuple[int, int]) -> bool:
        """Whether torch has code for a GPU of this compute capability.

        Code of an older GPU of the same generation runs on it (`sm_80` on 8.9), and PTX of any older one
        (`compute_80`): https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility
        """
        known = [
            (kind, divmod(int(digits), 10)) for kind, digits in map(_split, self.architectures) if digits.isdigit()
        ]
        return not known or any(
            version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in known
        )


def _split(architecture: str) -> tuple[str, str]:
    kind, _, digits = architecture.partition("_")
    return kind, digits.rstrip("af")  # sm_90a: for what is particular to it


def import_all() -> Imported:
    """Import them in another process, which takes some seconds; never raises."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return Imported(failed=str(problem))
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        return Imported(failed=lines[-1])
    try:
        found = json.loads(done.stdout.splitlines()[-1])  # libraries may print lines of their own
    except (ValueError, IndexError):
        return Imported(failed=f"the process printed {done.stdout[-80:]!r}")
    return Imported(gpus=found["gpus"], architectures=tuple(found["architectures"]))
