"""GPUs that a virtual machine can be made of: what a driver reports, and what the vendor says they can do.

Columns: memory in MiB as CUDA reports it (total less what the driver keeps, the figure in PyTorch's out-of-memory
messages; it varies by a few dozen MiB with driver and ECC), compute capability, streaming multiprocessors, dense
TFLOPS of matrix products in float16 with float32 accumulation, bfloat16 (0: not native) and float32, memory
bandwidth in GB/s, PCIe and NVLink bandwidth in GB/s per direction (0: none). `source` names the public document
with the rates; `fabric` marks boards that are always wired by NVLink; others may take an optional bridge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache


@dataclass(frozen=True)
class KnownGpu:
    """One row of the table; see the module docstring for units."""

    name: str
    memory_mib: int
    capability: tuple[int, int]
    multiprocessors: int
    tflops_float16: float
    tflops_bfloat16: float
    tflops_float32: float
    memory_gbps: float
    pcie_gbps: float
    nvlink_gbps: float
    source: str
    fabric: bool = False


_PASCAL = "NVIDIA Tesla P100 datasheet (2016); GeForce GTX 1080 Ti specifications"
_VOLTA = "NVIDIA V100 Tensor Core GPU datasheet (2020)"
_TURING = "NVIDIA Turing GPU Architecture whitepaper (WP-09183)"
_T4 = "NVIDIA T4 Tensor Core GPU datasheet (2019)"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet (2021)"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
_A_SERIES = "NVIDIA A10, A30, A40 datasheets (2021)"
_RTX_A = "NVIDIA RTX A4000, A5000, A6000 datasheets"
_ADA = "NVIDIA Ada GPU Architecture whitepaper"
_L_SERIES = "NVIDIA L4, L40, L40S datasheets (2023)"
_HOPPER = "NVIDIA H100, H100 NVL, H200 Tensor Core GPU datasheets"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
_B200 = "NVIDIA Blackwell B200 datasheet (2024)"

KNOWN_GPUS: dict[str, KnownGpu] = {
    # consumer
    "gtx1080ti": KnownGpu("NVIDIA GeForce GTX 1080 Ti", 11178, (6, 1), 28, 0.2, 0, 11.3, 484, 16, 0, _PASCAL),
    "rtx2060": KnownGpu("NVIDIA GeForce RTX 2060", 5919, (7, 5), 30, 25.8, 0, 6.5, 336, 16, 0, _TURING),
    "rtx2070": KnownGpu("NVIDIA GeForce RTX 2070", 7972, (7, 5), 36, 29.9, 0, 7.5, 448, 16, 0, _TURING),
    "rtx2080": KnownGpu("NVIDIA GeForce RTX 2080", 7972, (7, 5), 46, 40.3, 0, 10.1, 448, 16, 25, _TURING),
    "rtx2080ti": KnownGpu("NVIDIA GeForce RTX 2080 Ti", 11019, (7, 5), 68, 53.8, 0, 13.4, 616, 16, 50, _TURING),
    "rtx3050": KnownGpu("NVIDIA GeForce RTX 3050", 7972, (8, 6), 20, 18.2, 18.2, 9.1, 224, 8, 0, _GA102),
    "rtx3060": KnownGpu("NVIDIA GeForce RTX 3060", 12045, (8, 6), 28, 25.5, 25.5, 12.7, 360, 16, 0, _GA102),
    "rtx3060ti": KnownGpu("NVIDIA GeForce RTX 3060 Ti", 7974, (8, 6), 38, 32.4, 32.4, 16.2, 448, 32, 0, _GA102),
    "rtx3070": KnownGpu("NVIDIA GeForce RTX 3070", 7974, (8, 6), 46, 40.6, 40.6, 20.3, 448, 32, 0, _GA102),
    "rtx3080": KnownGpu("NVIDIA GeForce RTX 3080", 10009, (8, 6), 68, 59.5, 59.5, 29.8, 760, 32, 0, _GA102),
    "rtx3090": KnownGpu("NVIDIA GeForce RTX 3090", 24260, (8, 6), 82, 71.0, 71.0, 35.6, 936, 32, 56, _GA102),
    "rtx4060": KnownGpu("NVIDIA GeForce RTX 4060", 7807, (8, 9), 24, 30.2, 30.2, 15.1, 272, 16, 0, _ADA),
    "rtx4060ti16gb": KnownGpu("NVIDIA GeForce RTX 4060 Ti", 15937, (8, 9), 34, 44.1, 44.1, 22.1, 288, 16, 0, _ADA),
    "rtx4070": KnownGpu("NVIDIA GeForce RTX 4070", 12001, (8, 9), 46, 58.3, 58.3, 29.1, 504, 32, 0, _ADA),
    "rtx4070ti": KnownGpu("NVIDIA GeForce RTX 4070 Ti", 12001, (8, 9), 60, 80.2, 80.2, 40.1, 504, 32, 0, _ADA),
    "rtx4080": KnownGpu("NVIDIA GeForce RTX 4080", 16077, (8, 9), 76, 97.5, 97.5, 48.7, 717, 32, 0, _ADA),
    "rtx4090": KnownGpu("NVIDIA GeForce RTX 4090", 24217, (8, 9), 128, 165.2, 165.2, 82.6, 1008, 32, 0, _ADA),
    "rtx5070ti": KnownGpu("NVIDIA GeForce RTX 5070 Ti", 15836, (12, 0), 70, 87.9, 87.9, 43.9, 896, 64, 0, _BLACKWELL),
    "rtx5080": KnownGpu("NVIDIA GeForce RTX 5080", 15836, (12, 0), 84, 112.6, 112.6, 56.3, 960, 64, 0, _BLACKWELL),
    "rtx5090": KnownGpu("NVIDIA GeForce RTX 5090", 32112, (12, 0), 170, 209.5, 209.5, 104.8, 1792, 64, 0, _BLACKWELL),
    # workstation
    "rtxa4000": KnownGpu("NVIDIA RTX A4000", 15999, (8, 6), 48, 76.7, 76.7, 19.2, 448, 32, 0, _RTX_A),
    "rtxa5000": KnownGpu("NVIDIA RTX A5000", 24247, (8, 6), 64, 111.1, 111.1, 27.8, 768, 32, 56, _RTX_A),
    "rtxa6000": KnownGpu("NVIDIA RTX A6000", 48677, (8, 6), 84, 154.8, 154.8, 38.7, 768, 32, 56, _RTX_A),
    "rtx6000ada": KnownGpu("NVIDIA RTX 6000 Ada Generation", 48506, (8, 9), 142, 364.2, 364.2, 91.1, 960, 32, 0, _ADA),
    # datacenter
    "p100": KnownGpu("Tesla P100-PCIE-16GB", 16280, (6, 0), 56, 18.7, 0, 9.3, 732, 16, 0, _PASCAL),
    "v100": KnownGpu("Tesla V100-SXM2-16GB", 16160, (7, 0), 80, 125.0, 0, 15.7, 900, 16, 150, _VOLTA, True),
    "v100-32gb": KnownGpu("Tesla V100-SXM2-32GB", 32510, (7, 0), 80, 125.0, 0, 15.7, 900, 16, 150, _VOLTA, True),
    "t4": KnownGpu("Tesla T4", 14930, (7, 5), 40, 65.0, 0, 8.1, 320, 16, 0, _T4),
    "a10": KnownGpu("NVIDIA A10", 22725, (8, 6), 72, 125.0, 125.0, 31.2, 600, 32, 0, _A_SERIES),
    "a10g": KnownGpu("NVIDIA A10G", 22723, (8, 6), 80, 70.0, 70.0, 35.0, 600, 32, 0, _A_SERIES),
    "a30": KnownGpu("NVIDIA A30", 24169, (8, 0), 56, 165.0, 165.0, 10.3, 933, 32, 100, _A_SERIES),
    "a40": KnownGpu("NVIDIA A40", 45416, (8, 6), 84, 149.7, 149.7, 37.4, 696, 32, 56, _A_SERIES),
    "a100-40gb": KnownGpu("NVIDIA A100-SXM4-40GB", 40326, (8, 0), 108, 312.0, 312.0, 19.5, 1555, 32, 300, _A100, True),
    "a100": KnownGpu("NVIDIA A100-SXM4-80GB", 81153, (8, 0), 108, 312.0, 312.0, 19.5, 2039, 32, 300, _A100, True),
    "l4": KnownGpu("NVIDIA L4", 22563, (8, 9), 58, 121.0, 121.0, 30.3, 300, 32, 0, _L_SERIES),
    "l40": KnownGpu("NVIDIA L40", 45457, (8, 9), 142, 181.1, 181.1, 90.5, 864, 32, 0, _L_SERIES),
    "l40s": KnownGpu("NVIDIA L40S", 45457, (8, 9), 142, 362.1, 362.1, 91.6, 864, 32, 0, _L_SERIES),
    "h100-pcie": KnownGpu("NVIDIA H100 PCIe", 81004, (9, 0), 114, 756.0, 756.0, 51.0, 2000, 64, 300, _HOPPER),
    "h100": KnownGpu("NVIDIA H100 80GB HBM3", 81004, (9, 0), 132, 989.0, 989.0, 67.0, 3350, 64, 450, _HOPPER, True),
    "h200": KnownGpu("NVIDIA H200", 143072, (9, 0), 132, 989.0, 989.0, 67.0, 4800, 64, 450, _HOPPER, True),
    "b200": KnownGpu("NVIDIA B200", 182630, (10, 0), 148, 2250.0, 2250.0, 80.0, 8000, 64, 900, _B200, True),
}


@cache
def rates_of(name: str, capability: tuple[int, int], multiprocessors: int) -> KnownGpu:
    """Return the row of a GPU by its name; for one that is not in the table, the most alike row scaled to its size.

    The most alike has the nearest compute capability, then the nearest count of multiprocessors; TFLOPS grow with
    that count, bandwidths and the name are kept.
    """
    by_name = next((row for row in KNOWN_GPUS.values() if row.name == name), None)
    if by_name:
        return by_name

    def distance(row: KnownGpu) -> tuple[int, int]:
        major, minor = (mine - its for mine, its in zip(capability, row.capability, strict=True))
        return abs(10 * major + minor), abs(multiprocessors - row.multiprocessors)

    alike = min(KNOWN_GPUS.values(), key=distance)
    scale = multiprocessors / alike.multiprocessors if multiprocessors else 1.0
    rates = {key: getattr(alike, key) * scale for key in ("tflops_float16", "tflops_bfloat16", "tflops_float32")}
    return replace(alike, source=f"scaled from {alike.name}", fabric=False, **rates)
