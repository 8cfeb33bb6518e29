"""Rows of one image over GPUs, beside one GPU and beside diffusers with and without its tiling: seconds, bytes, errors.

    python benchmarks/rows.py FOLDER OUT.json [--model sana_1600m_controlnet] [--sides 1024 2048 4096] [--steps 20]
    python benchmarks/rows.py FOLDER OUT.json --sides 4096 --cap 24        (one GPU, and the same with 24 GiB of it)
    python benchmarks/rows.py tiny OUT.json --devices cpu cpu --sides 64

FOLDER gets a checkpoint with random weights, unless it is there (`make_checkpoint.py`); `tiny` is the generated one.
For each side these are measured, the first device alone first: a denoising step with guidance (ControlNet and
transformer), the VAE's encode and decode (whole, in tiles as diffusers cuts them, in eight bands on the first device,
and over all devices), and the whole image. A row has the median seconds, the most that PyTorch's allocator had on each
device, the bytes that crossed, and how far the result is from that of the first device: in its norm, in its largest
value, and for pictures as PSNR in dB. `float32` rows are of the smallest side, 1024 px at most. With
`--cap` only whole images of the first GPU are drawn, then by a plan for so much of its memory, which PyTorch may not
exceed. A case that runs out of memory says so. OUT.json is written after each case; a table is printed at the end.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from make_checkpoint import make_checkpoint
from torch import Tensor

from sana_deploy import ResolvedPlan, compile_plan, load_pipeline, place, unplace
from sana_deploy._units import GIB, MIB
from sana_deploy.declare.control_image import read_control_image
from sana_deploy.facts.allocator import context_bytes
from sana_deploy.facts.machine import probe
from sana_deploy.facts.tiny import ensure_tiny
from sana_deploy.run.hook import border_of
from sana_deploy.run.rows.autoencoder import decode, encode
from sana_deploy.run.rows.exchange import Group

BANDS = 8
"""Of an image on one device."""
FLOAT32_SIDE = 1024
"""The largest side in pixels that is compared in float32."""


@dataclass
class Bench:
    """What is measured, and where."""

    folder: Path
    devices: list[torch.device]
    out: Path
    turns: int
    steps: int
    most_seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def synchronize(self) -> None:
        """Wait for all devices."""
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def clean(self) -> None:
        """Give back what is not held, and look for peaks anew."""
        gc.collect()
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                with torch.cuda.device(device):
                    torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)

    def peaks(self) -> dict[str, float]:
        """GiB that the allocator had at most."""
        gpus = [device for device in dict.fromkeys(self.devices) if device.type == "cuda"]
        return {str(device): round(torch.cuda.max_memory_allocated(device) / 2**30, 3) for device in gpus}

    def case(self, side: int, what: str, way: str, work: Callable[[], Tensor], wanted: Tensor | None) -> Tensor | None:
        """Time `work`, compare what it gives with `wanted`, and write the row down; None where memory ran out."""
        row: dict[str, Any] = {"side": side, "what": what, "way": way}
        self.rows.append(row)
        found = None
        try:
            self.clean()
            found = work().cpu()  # the first call warms up
            seconds: list[float] = []
            while len(seconds) < self.turns and sum(seconds) < self.most_seconds:
                self.synchronize()
                started = time.perf_counter()
                work()
                self.synchronize()
                seconds.append(time.perf_counter() - started)
            row |= {"seconds": round(median(seconds), 5), "turns": len(seconds), "peak_gib": self.peaks()}
            if wanted is not None:
                row |= difference(found, wanted)
        except torch.OutOfMemoryError as problem:
            row["out_of_memory"] = str(problem).splitlines()[0]
        self.write()
        return found

    def write(self) -> None:
        """Write all rows."""
        names = [torch.cuda.get_device_name(one) if one.type == "cuda" else str(one) for one in self.devices]
        facts = {"devices": names, "torch": torch.__version__, "diffusers": diffusers.__version__}
        self.out.write_text(json.dumps({**facts, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")


def difference(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """How far a result is from another one: in norm and in the largest value over those of `wanted`, and PSNR in dB.

    PSNR counts `wanted`'s range as the peak. Large results are taken a slice at a time.
    """
    squares = norm = worst = largest = 0.0
    for a, b in zip(*(torch.split(one.flatten(), 1 << 24) for one in (found, wanted)), strict=True):
        apart, size = (a.double() - b.double()).abs(), b.double().abs()
        squares, norm = squares + float((apart**2).sum()), norm + float((size**2).sum())
        worst, largest = max(worst, float(apart.max())), max(largest, float(size.max()))
    spread = float(wanted.double().max() - wanted.double().min()) if wanted.numel() < 1 << 28 else 2 * largest
    mean = squares / wanted.numel()
    rows = {"relative": math.sqrt(squares / norm) if norm else 0.0, "largest": worst / largest if largest else 0.0}
    psnr = {} if not mean else {"psnr_db": round(10 * math.log10(spread**2 / mean), 2)}
    return {**{key: float(f"{value:.3g}") for key, value in rows.items()}, **psnr}


def resolved(bench: Bench, side: int, split: bool, *more: str) -> ResolvedPlan:
    """A plan for one device, or with the rows on all; for the CPU, units are put there by hand."""
    bench.clean()  # what is kept for later tensors is not free for a plan
    pinned = ["text_encoder", "vae", "transformer", "controlnet"]
    on_gpus = [
        "hardware=multi_gpu_balanced", f"hardware.use={list(range(len(bench.devices) if split else 1))}",
        "hardware.objective=latency", *(f"hardware.pin.{name}=0" for name in pinned),
        f"hardware.split={'rows' if split else 'none'}",
    ]  # fmt: skip
    cpu = bench.devices[0].type == "cpu"
    model = ["model=tiny"] if bench.folder == ensure_tiny() else ["model=checkpoint", f"model.source={bench.folder}"]
    plan = compile_plan([
        *model, *([] if cpu else on_gpus), "hardware.allow=[encode_once]", "runtime=eager",
        "precision=fp32" if cpu else "precision=mixed_bf16", "workload.prompt=a lighthouse", "workload.seed=1",
        f"workload.steps={bench.steps}", f"workload.height={side}", f"workload.width={side}", *more,
    ])  # fmt: skip
    found = plan.resolve()
    if not (cpu and split):
        return found
    count = min(len(bench.devices), side // 32)
    units = {f"{name}.{i}": "cpu" for i in range(1, count) for name in plan.pipeline.looped}
    return replace(found, plan=plan.model_copy(update={"split": "rows", "rows": [1] * count}), unit_devices=units)


def step_of(pipeline: Any, side: int) -> Callable[[], Tensor]:
    """A denoising step with guidance, on inputs that do not change."""
    net, model = pipeline.controlnet, pipeline.transformer
    device, cells, dtype = next(model.parameters()).device, side // 32, model.dtype
    make = torch.Generator().manual_seed(side)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(device, dtype)

    given = {
        "hidden_states": normal(2, model.config.in_channels, cells, cells),
        "encoder_hidden_states": normal(2, 300, model.config.caption_channels),
        "timestep": torch.full((2,), 500, device=device),
        "encoder_attention_mask": torch.ones(2, 300, device=device, dtype=torch.int64),
        "return_dict": False,
    }
    condition = normal(2, model.config.in_channels, cells, cells)

    @torch.no_grad()
    def step() -> Tensor:
        residuals = tuple(net(**given, controlnet_cond=condition)[0])
        prediction: Tensor = model(**given, controlnet_block_samples=residuals)[0]
        return prediction

    return step


def measure_steps(bench: Bench, pipeline: Any, side: int) -> None:
    """A step on one device, and with its rows on all."""
    place(pipeline, resolved(bench, side, False))
    alone = bench.case(side, "step", "one device", step_of(pipeline, side), None)
    unplace(pipeline)
    place(pipeline, resolved(bench, side, True))
    state = border_of(pipeline).state
    step = step_of(pipeline, side)
    with torch.no_grad():
        step()
    state.traffic.moved.clear()
    step()
    crossed = {f"{src}->{dst} {name}": size for (src, dst, name), size in sorted(state.traffic.moved.items())}
    bench.case(side, "step", "rows", step, alone)
    dealt = [rows for team in pipeline.transformer.forward.teams for rows in team.shares]
    bench.rows[-1] |= {"bytes": sum(crossed.values()), "crossed": crossed, "dealt": dealt}
    unplace(pipeline)


def measure_vae(bench: Bench, vae: Any, side: int) -> None:
    """Encode and decode: whole, in tiles, in bands on one device, and over all devices."""
    home = bench.devices[0]
    vaes = [vae if device == home else copy.deepcopy(vae).to(device) for device in bench.devices]
    make = torch.Generator().manual_seed(side)
    latents = torch.randn(1, vae.config.latent_channels, side // 32, side // 32, generator=make).to(home, vae.dtype)
    image = torch.randn(1, 3, side, side, generator=make).to(home, vae.dtype)
    for what, whole, banded, given in (
        ("decode", lambda x: vae.decode(x).sample, decode, latents),
        ("encode", lambda x: vae.encode(x).latent, encode, image),
    ):
        ways: dict[str, Callable[[], Tensor]] = {
            "one device": lambda whole=whole, given=given: whole(given),  # type: ignore[misc]
            f"{BANDS} bands on one device": lambda banded=banded, given=given: banded(  # type: ignore[misc]
                [vae] * BANDS, Group([home] * BANDS), given
            ),
            "rows": lambda banded=banded, given=given: banded(vaes, Group(bench.devices), given),  # type: ignore[misc]
        }
        wanted = None
        for way, work in ways.items():
            found = bench.case(side, what, way, torch.no_grad()(work), wanted)
            wanted = found if wanted is None else wanted
        vae.enable_tiling()
        bench.case(side, what, "tiles of diffusers", torch.no_grad()(ways["one device"]), wanted)
        vae.disable_tiling()


def drawer(pipeline: Any, plan: ResolvedPlan) -> Callable[[], Tensor]:
    """Draws the plan's request: pixels (1, 3, side, side)."""
    work = plan.plan.spec.workload
    given = plan.plan.pipeline.arguments(work.request, work.bounds, read_control_image(work, work.bounds))
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        images: Tensor = pipeline(**given, generator=torch.Generator().manual_seed(1), output_type="pt").images
        return images

    return draw


def measure_images(bench: Bench, pipeline: Any, side: int) -> None:
    """The whole image: on one device, with tiles, and with the rows of the denoiser on all devices."""
    wanted = None
    for way in ("one device", "tiles of diffusers", "rows"):
        plan = resolved(bench, side, way == "rows")
        place(pipeline, plan)
        if way == "tiles of diffusers":
            pipeline.vae.enable_tiling()
        found = bench.case(side, "image", way, drawer(pipeline, plan), wanted)
        wanted = found if wanted is None else wanted
        pipeline.vae.disable_tiling()
        unplace(pipeline)


def measure_float32(bench: Bench, pipeline: Any, side: int) -> None:
    """The same in float32, where what is left is the order of sums."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    place(pipeline, resolved(bench, side, False, "precision=fp32"))
    alone = bench.case(side, "step", "one device, float32", step_of(pipeline, side), None)
    unplace(pipeline)
    place(pipeline, resolved(bench, side, True, "precision=fp32"))
    bench.case(side, "step", "rows, float32", step_of(pipeline, side), alone)
    unplace(pipeline)


def measure_capped(bench: Bench, pipeline: Any, side: int, cap: int) -> None:
    """The whole image on one GPU, with all its memory and with so many GiB of it, by a plan that changes no pixels."""
    gpu = probe().gpus[0]
    kept = f"hardware.keep_free={(gpu.total_bytes - cap * GIB) // MIB}MiB"
    allow = "hardware.allow=[encode_once,vae_slicing,text_encoder_offload,vae_bands]"
    wanted = None
    for way, more in (("one device", ()), (f"{cap} GiB of it", (kept, allow))):
        pipeline.to("cpu")  # a plan counts what is free
        plan = resolved(bench, side, False, *more)
        if more:
            usable = cap * GIB - context_bytes(gpu.capability)
            torch.cuda.set_per_process_memory_fraction(usable / torch.cuda.mem_get_info(0)[1], 0)
        place(pipeline, plan)
        found = bench.case(side, "image", way, drawer(pipeline, plan), wanted)
        wanted = found if wanted is None else wanted
        bench.rows[-1] |= {"knobs": list(plan.plan.knobs), "vae_band_count": plan.plan.vae_band_count}
        bench.write()
        unplace(pipeline)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in columns, seconds also over those of the first way."""
    lines = [f"{'side':>5} {'what':8}{'way':26}{'s':>9}{'over':>7}{'GiB':>16}{'relative':>10}{'PSNR':>8}"]
    first: dict[tuple[int, str], float] = {}
    for row in rows:
        if "out_of_memory" in row:
            lines.append(f"{row['side']:5} {row['what']:8}{row['way']:26}out of memory")
            continue
        base = first.setdefault((row["side"], row["what"]), row["seconds"])
        peaks = " ".join(f"{size:.2f}" for size in row["peak_gib"].values())
        lines.append(
            f"{row['side']:5} {row['what']:8}{row['way']:26}{row['seconds']:9.4f}{row['seconds'] / base:7.2f}"
            f"{peaks:>16}{row.get('relative', ''):>10}{row.get('psnr_db', ''):>8}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="rows of one image over GPUs")
    parser.add_argument("folder", help="a checkpoint, or `tiny`")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="sana_1600m_controlnet")
    parser.add_argument("--devices", nargs="+", default=[f"cuda:{i}" for i in range(torch.cuda.device_count())])
    parser.add_argument("--sides", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--most-seconds", type=float, default=8.0, help="of turns of one case")
    parser.add_argument("--cap", type=int, default=0, help="GiB that one GPU may take")
    options = parser.parse_args(arguments)
    folder = ensure_tiny() if options.folder == "tiny" else Path(options.folder)
    if options.folder != "tiny" and not (folder / "model_index.json").exists():
        make_checkpoint(options.model, folder)
    devices = [torch.device(name) for name in options.devices]
    if len(devices) < 2 and not options.cap:
        parser.error(f"rows need two devices, {len(devices)} found")
    bench = Bench(folder, devices, options.out, options.turns, options.steps, options.most_seconds)
    pipeline = load_pipeline(resolved(bench, options.sides[0], False))
    unplace(pipeline)
    for side in options.sides if options.cap else ():
        measure_capped(bench, pipeline, side, options.cap)
    for side in () if options.cap else options.sides:
        measure_steps(bench, pipeline, side)
        measure_vae(bench, pipeline.vae, side)
        measure_images(bench, pipeline, side)
    if not options.cap:
        measure_float32(bench, pipeline, min([FLOAT32_SIDE, *options.sides]))  # last: it casts the weights
    print(table(bench.rows))


if __name__ == "__main__":
    main()
