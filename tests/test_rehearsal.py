"""Rehearsals: the whole deployment on virtual GPUs, equal to the real thing where that can be told."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaControlNetPipeline

from sana_deploy import Outcome, rehearse
from sana_deploy.api import compile_spec
from sana_deploy.declare.pipelines import COMPONENTS
from sana_deploy.declare.spec import DeploySpec, VirtualMachine
from sana_deploy.errors import CheckpointError, InfeasibleError, RunError
from sana_deploy.facts.virtual_machine import describe_machine
from sana_deploy.rehearsal.rehearse import open_host, rehearse_request
from sana_deploy.run.generate import generate, run_request
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.traffic import by_pair

Small = Callable[..., DeploySpec]
EACH_ALONE = ["hardware=custom_map", "hardware.device_map={text_encoder: 0, vae: 1, transformer: 2, controlnet: 3}"]
ONE = ["machine=virtual", "machine.gpus=rtx4090"]
FOUR = ["machine=virtual", "machine.gpus=4xrtx4090"]


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("precision", ["mixed_bf16", "fp32"])
def test_on_four_gpus_the_image_is_that_of_one_and_of_the_cpu_bit_for_bit(small: Small, precision: str) -> None:
    chosen = f"precision={precision}"
    four = rehearse(compile_spec(small(chosen, *FOUR, *EACH_ALONE)))
    one = rehearse(compile_spec(small(chosen, *ONE, "hardware=single_gpu")))
    spec = small(chosen)
    cpu, _ = generate(load_pipeline(compile_spec(spec)), spec.workload.bounds, spec.workload.request)
    assert four.images[0].tobytes() == one.images[0].tobytes() == cpu[0].tobytes()
    assert four.report.fidelity == "numbers"
    assert len(four.report.gpus) == 4
    assert one.report.transfers == []


@pytest.mark.usefixtures("short_prompts")
def test_shapes_and_numbers_report_the_same_bytes(small: Small) -> None:
    plan = compile_spec(small(*FOUR, *EACH_ALONE))
    numbers, shapes = rehearse(plan, "numbers").report, rehearse(plan, "shapes").report
    assert shapes.steps_rehearsed == numbers.steps_rehearsed == 2
    for one, other in zip(shapes.gpus, numbers.gpus, strict=True):
        later = {"phase_peaks", "phase_activations"}
        assert one.model_dump(exclude=later) == other.model_dump(exclude=later)
        for phase, peak in other.phase_peaks.items():  # what stood in the place of a pool is given up a little later
            assert one.phase_peaks[phase] == pytest.approx(peak, abs=16384)
    assert shapes.transfers == numbers.transfers
    assert rehearse(plan, "shapes").images == []


@pytest.mark.usefixtures("short_prompts")
def test_later_steps_are_those_rehearsed_again(small: Small) -> None:
    plan = compile_spec(small(*FOUR, *EACH_ALONE, "workload.steps=5"))
    numbers, shapes = rehearse(plan, "numbers").report, rehearse(plan, "shapes").report
    assert shapes.steps_rehearsed == 2
    assert shapes.transfers == numbers.transfers
    for one, other in zip(shapes.gpus, numbers.gpus, strict=True):
        assert abs(one.peak_bytes - other.peak_bytes) <= 4096, "the table of timesteps is longer, nothing else"


@pytest.mark.usefixtures("short_prompts")
def test_traffic_at_the_borders_is_all_there_is_between_gpus(small: Small) -> None:
    resolved = compile_spec(small(*FOUR, *EACH_ALONE)).resolve()
    host = open_host(resolved)
    pipeline = load_pipeline(resolved, host=host)
    state = RequestState()
    rehearse_request(pipeline, resolved, host, state=state)
    between = {f"{a}->{b}": n for (a, b), n in host.ledger.traffic.items() if "cpu" not in (a, b)}
    assert by_pair(state.traffic.moved) == between


@pytest.mark.parametrize("precision", ["mixed_bf16", "bf16", "fp32"])
def test_what_stays_the_same_between_steps_crosses_once(small: Small, precision: str) -> None:
    plan = compile_spec(small(f"precision={precision}", *FOUR, EACH_ALONE[0], EACH_ALONE[1], "workload.steps=4"))
    report = rehearse(plan).report
    every_step = {moved.tensor for moved in report.transfers if moved.bytes_per_step}
    assert every_step == {"hidden_states", "timestep", "controlnet_block_samples"}
    planned = {
        (f"vgpu:{m.src}", f"vgpu:{m.dst}", m.tensor): (m.bytes_per_step, m.bytes_per_image) for m in plan.transfers
    }
    assert planned == {(m.src, m.dst, m.tensor): (m.bytes_per_step, m.bytes_per_image) for m in report.transfers}


def test_with_controlnet_beside_the_transformer_nothing_moves_per_step(small: Small) -> None:
    together = "hardware.device_map={text_encoder: 0, vae: 0, transformer: 1, controlnet: 1}"
    plan = compile_spec(small(*FOUR, "hardware=custom_map", together))
    report = rehearse(plan).report
    assert plan.estimates.bytes_per_step == 0
    assert {moved.bytes_per_step for moved in report.transfers} == {0}
    assert {moved.tensor for moved in report.transfers} == {
        "input_ids", "attention_mask", "prompt_embeds", "control_image", "control_latents", "latents",
    }  # fmt: skip


@pytest.mark.usefixtures("short_prompts")
def test_a_naive_placement_by_hand_fails_as_on_cuda_and_ours_passes(tiny: Path, small: Small) -> None:
    plan = compile_spec(small(*FOUR, *EACH_ALONE))
    resolved = plan.resolve()
    host = open_host(resolved)
    naive = SanaControlNetPipeline.from_pretrained(tiny)
    for index, name in enumerate(COMPONENTS):
        host.place_module(getattr(naive, name), name, torch.device("vgpu", index))
    naive.set_progress_bar_config(disable=True)
    with host, pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        naive("a cat", control_image=torch.zeros(1, 3, 64, 96), height=64, width=96, num_inference_steps=1,
              use_resolution_binning=False)  # fmt: skip
    assert rehearse(plan).images


@pytest.mark.slow
@pytest.mark.usefixtures("short_prompts")
def test_memory_comes_back_and_a_twentieth_call_takes_no_more_than_the_second(small: Small) -> None:
    resolved = compile_spec(small(*FOUR, *EACH_ALONE, "workload.steps=1")).resolve()
    host = open_host(resolved, "shapes")
    pipeline = load_pipeline(resolved, host=host)
    workload = resolved.plan.spec.workload
    live = []
    with host:
        for _ in range(20):
            run_request(pipeline, workload.bounds, workload.request)
            live.append([host.ledger.live(gpu) for gpu in range(4)])
    assert live[1] == live[-1]
    left = [held - host.pools[gpu] for gpu, held in enumerate(host.ledger.activations)]
    assert all(one < 2**18 for one in left), "only the scheduler's few numbers stay, and what graphs keep"


def test_out_of_memory_names_gpu_component_and_amounts(small: Small) -> None:
    large = ["workload.height=2048", "workload.width=2048", "machine=virtual", "runtime=eager"]
    planned = compile_spec(small(*large, "machine.gpus=rtx4090")).resolve()
    box = describe_machine(VirtualMachine(kind="virtual", gpus="600MiB"))
    with pytest.raises(RunError, match=r"vgpu:0 is out of memory: vae tried to allocate .* in prepare") as caught:
        rehearse(replace(planned, machine=box), "shapes")
    assert caught.value.exit_code == 6


def test_weights_that_do_not_fit_are_named_while_loading(small: Small) -> None:
    planned = compile_spec(small(*ONE)).resolve()
    box = describe_machine(VirtualMachine(kind="virtual", gpus="475MiB"))
    with pytest.raises(
        RunError, match=r"while loading transformer: vgpu:0 is out of memory: transformer tried"
    ) as caught:
        rehearse(replace(planned, machine=box), "shapes")
    assert caught.value.exit_code == 6


def test_the_plan_s_estimate_is_compared(small: Small) -> None:
    report = rehearse(compile_spec(small("model=sana_600m_controlnet", *FOUR))).report
    for gpu in report.gpus:
        tensors = gpu.peak_bytes - gpu.context_bytes - gpu.allocator_bytes
        assert gpu.planned_error == pytest.approx(gpu.planned_bytes / tensors - 1, abs=1e-4)
        assert gpu.peak_bytes <= gpu.capacity_bytes
    assert report.work["transformer"].flops > report.work["controlnet"].flops > 0
    assert {moment.phase for moment in report.timeline} >= {"encode", "prepare", "denoise", "decode"}


@pytest.mark.usefixtures("short_prompts")
def test_nothing_leaks_into_the_process(tiny: Path, small: Small) -> None:
    spec = small("precision=fp32")
    before, _ = generate(load_pipeline(compile_spec(spec)), spec.workload.bounds, spec.workload.request)
    rehearse(compile_spec(small(*FOUR, *EACH_ALONE)))
    after, _ = generate(load_pipeline(compile_spec(spec)), spec.workload.bounds, spec.workload.request)
    assert np.array_equal(np.asarray(before[0]), np.asarray(after[0]))
    assert torch.tensor([1, 2]).device.type == "cpu"
    assert not torch._C._only_lift_cpu_tensors()
    assert not torch.accelerator.is_available() or torch.cuda.is_available()


@pytest.mark.parametrize("model", ["tiny", "sana_600m_controlnet"])
def test_the_plan_foresees_every_crossing_to_the_byte(small: Small, model: str) -> None:
    plan = compile_spec(small(f"model={model}", *FOUR, *EACH_ALONE, "workload.steps=7", "workload.batch=2"))
    planned = {
        (f"vgpu:{t.src}", f"vgpu:{t.dst}", t.tensor, t.bytes_per_step, t.bytes_per_image) for t in plan.transfers
    }
    report = rehearse(plan, "shapes").report
    assert {tuple(moved.model_dump().values()) for moved in report.transfers} == planned


def test_a_single_step_tells_its_traffic_too(small: Small) -> None:
    report = rehearse(compile_spec(small(*FOUR, *EACH_ALONE, "workload.steps=1"))).report
    moved = {transfer.tensor: transfer.bytes_per_step for transfer in report.transfers}
    assert moved["controlnet_block_samples"] > 0
    assert moved["control_image"] == moved["prompt_embeds"] == 0


@pytest.mark.parametrize("model", ["tiny", "sana_600m_controlnet"])
def test_a_component_on_the_cpu_is_rehearsed_there(small: Small, model: str) -> None:
    places = "hardware.device_map={text_encoder: cpu, vae: 0, transformer: 0, controlnet: 0}"
    report = rehearse(compile_spec(small(f"model={model}", *ONE, "hardware=custom_map", places))).report
    assert {(moved.src, moved.dst) for moved in report.transfers} == {("cpu", "vgpu:0"), ("vgpu:0", "cpu")}


@pytest.mark.usefixtures("short_prompts")
def test_the_outcome_measures_the_whole_request(small: Small) -> None:
    plan = compile_spec(small(*FOUR, *EACH_ALONE, "workload.steps=5"))
    shapes, numbers = rehearse(plan, "shapes"), rehearse(plan, "numbers")
    assert shapes.measured.bytes_moved == numbers.measured.bytes_moved
    assert shapes.measured.bytes_per_step == numbers.measured.bytes_per_step
    assert shapes.measured.peak_bytes == {gpu.device: gpu.peak_bytes for gpu in shapes.report.gpus}
    per_image = sum(moved.bytes_per_image for moved in shapes.report.transfers)
    assert sum(shapes.measured.bytes_moved.values()) == per_image


@pytest.mark.usefixtures("short_prompts")
def test_torch_cuda_is_never_touched(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("torch.cuda was touched")

    for name in ("synchronize", "mem_get_info", "max_memory_allocated", "device_count", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert rehearse(compile_spec(small(*FOUR, *EACH_ALONE))).images


def test_incomplete_configs_are_named(tiny: Path, small: Small, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    spec = small("model=checkpoint", f"model.source={folder}", *ONE, "machine.fidelity=shapes")
    plan = compile_spec(spec)
    config = folder / "vae" / "config.json"
    values = json.loads(config.read_text())
    values["encoder_block_types"] = ["NoSuchBlock"]
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"the config of vae is incomplete"):
        rehearse(compile_spec(spec))
    assert plan.digest != compile_spec(spec).digest


def test_a_plan_for_real_gpus_is_not_rehearsed_and_the_other_way_round(small: Small) -> None:
    with pytest.raises(InfeasibleError, match="needs virtual ones"):
        rehearse(compile_spec(small()))
    with pytest.raises(RunError, match="virtual GPUs"):
        load_pipeline(compile_spec(small(*ONE)))
    with pytest.raises(InfeasibleError, match="has none here"):
        rehearse(compile_spec(small(*ONE, "model=sana_600m_controlnet", "machine.fidelity=numbers")))


@pytest.mark.usefixtures("short_prompts")
def test_the_command_rehearses_and_writes_what_it_told(
    here: Callable[..., subprocess.CompletedProcess[str]], tiny: Path, tmp_path: Path
) -> None:
    done = here("machine=2xt4", "precision=fp32", "workload.height=64", "workload.width=64", "workload.steps=2")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*")
    outcome = Outcome.model_validate_json((folder / "outcome.json").read_text())
    assert outcome.rehearsal is not None
    assert outcome.rehearsal.fidelity == "numbers"
    assert (folder / "image-000.png").is_file()
    assert "rehearsed in numbers, 2 of 2 steps" in done.stderr
    assert "vgpu:0: peak" in done.stderr


@pytest.mark.parametrize("side", [256, 768])
def test_peaks_agree_with_pytorch_s_own_memory_tracker(small: Small, side: int) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(MemTracker):  # type: ignore[no-untyped-call]
        """MemTracker without its statistics per module, which do not allow a module to be called twice."""

        def _pre_fw_hook(self, *_: object) -> None: ...

        def _post_fw_hook(self, *_: object) -> None: ...

    request = [
        "precision=fp32",
        "runtime=eager",
        f"workload.height={side}",
        f"workload.width={side}",
        "workload.steps=1",
    ]
    (gpu,) = rehearse(compile_spec(small(*request, *ONE, "hardware=single_gpu")), "shapes").report.gpus
    spec = small(*request)
    pipeline = load_pipeline(compile_spec(spec))
    tracker = Tracker()
    tracker.track_external(*(getattr(pipeline, name) for name in COMPONENTS))
    with tracker:
        run_request(pipeline, spec.workload.bounds, spec.workload.request)
    independent = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert gpu.peak_bytes - gpu.context_bytes - gpu.allocator_bytes == pytest.approx(independent, rel=0.02)


@pytest.mark.slow
def test_the_whole_story_takes_27_plain_lines_of_80_columns(
    cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    plain = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "ascii"}
    done = cli("model=sana_1600m_controlnet", "machine=2x8gb", **plain)
    assert done.returncode == 0, done.stderr
    assert done.stderr.isascii()
    progress = ("loading", "rehearsing", "profiling")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(progress)]
    assert len(lines) <= 27, done.stderr
    assert max(len(line) for line in lines if not line.startswith(("saved", "next:"))) <= 80
    for told in (
        "GPU 0",
        "GPU 1",
        "text_encoder",
        "knob encode_once saves ~1.76 GiB and ~0.54 s",
        "moves GPU 0 -> GPU 1",
        "rejected",
        "vgpu:1: peak",
    ):
        assert told in done.stderr
