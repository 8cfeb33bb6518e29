"""Replicas that are loaded: they draw what one pipeline draws, at once, and a rehearsal holds all of them."""

from __future__ import annotations

import functools
import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sana_deploy import compile_plan, load_pipelines, rehearse, unplace
from sana_deploy._units import MIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError, UsageError
from sana_deploy.facts.allocator import context_bytes
from sana_deploy.plan.artifact import Plan
from sana_deploy.rehearsal.rehearse import open_host
from sana_deploy.run.generate import generate, run_request
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.replicas import generate_each, request_of

Small = Callable[..., DeploySpec]
Here = Callable[..., subprocess.CompletedProcess[str]]
TWO = ("machine=virtual", "machine.gpus=2xrtx4090", "hardware.replicas=2")


@pytest.fixture
def plan(small: Small) -> Plan:
    return compile_spec(small(*TWO))


@pytest.mark.usefixtures("short_prompts")
def test_replicas_draw_the_same_picture_bit_for_bit(plan: Plan) -> None:
    resolved = plan.resolve()
    host = open_host(resolved, "numbers")
    one, other = load_pipelines(resolved, host=host)
    assert [set(pipeline.hf_device_map.values()) for pipeline in (one, other)] == [{"vgpu:0"}, {"vgpu:1"}]
    workload = plan.spec.workload
    with host:
        drawn = [run_request(pipeline, workload.bounds, workload.request)[0].cpu() for pipeline in (one, other)]
    assert torch.equal(*drawn)
    assert drawn[0].std() > 0.01
    unplace(one)
    assert one.hf_device_map is None
    assert set(other.hf_device_map.values()) == {"vgpu:1"}, "each is taken off by itself"


def test_a_plan_of_one_gives_one_pipeline(small: Small) -> None:
    (pipeline,) = load_pipelines(compile_spec(small()))
    assert pipeline.hf_device_map is not None
    with pytest.raises(UsageError, match="a plan is needed"):
        load_pipelines("plan.json")  # type: ignore[arg-type]


def test_progress_names_the_replica(plan: Plan) -> None:
    seen: set[str] = set()
    resolved = plan.resolve()
    load_pipelines(resolved, lambda name, done, of: seen.add(name), open_host(resolved, "numbers"))
    assert seen == {name for part in plan.components for name in (part, f"{part} 1")}


@pytest.mark.usefixtures("short_prompts")
def test_a_rehearsal_holds_every_gpu_and_runs_replicas_that_are_alike_once(plan: Plan) -> None:
    whole, alone = rehearse(plan).report, rehearse(plan.each()[1]).report
    assert (whole.replicas, whole.replicas_rehearsed) == (2, 1)
    assert [gpu.device for gpu in whole.gpus] == ["vgpu:0", "vgpu:1"]
    assert whole.gpus[1] == alone.gpus[0], "the replica that was not rehearsed is as full as it is when it is"
    assert (alone.replicas, alone.timeline != []) == (1, True)


@pytest.mark.usefixtures("short_prompts")
def test_replicas_with_the_halves_of_guidance_apart_are_rehearsed_on_all_their_gpus(small: Small) -> None:
    plan = compile_spec(small("machine=virtual", "machine.gpus=4xrtx4090", "hardware.replicas=2",
                              "hardware.split=guidance", "workload.guidance_scale=4.5"))  # fmt: skip
    report = rehearse(plan).report
    assert (report.replicas, report.replicas_rehearsed) == (2, 1)
    assert [gpu.device for gpu in report.gpus] == [f"vgpu:{number}" for number in range(4)]
    slots = {slot.index: slot for slot in plan.all_slots}
    for number, gpu in enumerate(report.gpus):
        assert gpu.planned_bytes == slots[number].weights_bytes + slots[number].activation_bytes
    peaks = [gpu.peak_bytes for gpu in report.gpus]
    assert peaks[:2] == peaks[2:]
    assert all(peaks)
    assert {"transformer.1", "controlnet.1"} <= {moment.component for moment in report.timeline}
    resolved = plan.resolve()
    host = open_host(resolved, "numbers")
    one, other = load_pipelines(resolved, host=host)
    workload = plan.spec.workload
    with host:
        drawn = [run_request(pipeline, workload.bounds, workload.request)[0].cpu() for pipeline in (one, other)]
    assert torch.equal(*drawn)
    assert drawn[0].std() > 0.01


@pytest.mark.usefixtures("short_prompts")
def test_replicas_that_differ_are_each_rehearsed(small: Small) -> None:
    plan = compile_spec(small("machine=virtual", "machine.gpus='rtx4090,h100,rtx4090'", "hardware.replicas=3"))
    report = rehearse(plan).report
    assert (report.replicas, report.replicas_rehearsed) == (3, 2)
    assert [(gpu.device, "H100" in gpu.gpu) for gpu in report.gpus] == [
        ("vgpu:0", False), ("vgpu:1", True), ("vgpu:2", False)
    ]  # fmt: skip
    slots = {slot.index: slot for slot in plan.all_slots}
    for number, gpu in enumerate(report.gpus):
        assert gpu.planned_bytes == slots[number].weights_bytes + slots[number].activation_bytes


def test_a_virtual_gpu_that_is_too_small_for_a_later_replica_ends_the_rehearsal(plan: Plan) -> None:
    later = plan.replicas[0]
    room = 16 * MIB + context_bytes((8, 9))
    slot = later.slots[0].model_copy(update={"allocator_bytes": later.slots[0].available_bytes - room})
    small = plan.model_copy(update={"replicas": [later.model_copy(update={"slots": [slot]})]})
    with pytest.raises(RunError, match=r"out of memory.*vgpu:1"):
        rehearse(small)


@pytest.fixture
def pair(small: Small) -> tuple[DeploySpec, list[Any]]:
    """Two pipelines on the CPU, which stand for two on GPUs: threads and seeds are the same."""
    spec = small()
    plan = compile_spec(spec)
    return spec, [load_pipeline(plan), load_pipeline(plan)]


@pytest.mark.usefixtures("short_prompts")
def test_pipelines_draw_at_once_each_its_own_seed(pair: tuple[DeploySpec, list[Any]]) -> None:
    spec, pipelines = pair
    bounds, request = spec.workload.bounds, spec.workload.request
    met = threading.Barrier(2, timeout=60)  # passes only where both are in the pipeline at the same time
    for pipeline in pipelines:
        encode = pipeline.encode_prompt
        pipeline.encode_prompt = lambda *given, call=encode, **named: (met.wait(), call(*given, **named))[1]
    images, measured = generate_each(pipelines, bounds, request)
    for pipeline in pipelines:
        del pipeline.encode_prompt
    wanted = [generate(pipelines[0], bounds, request_of(request, number))[0][0] for number in range(2)]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in wanted]
    assert images[0].tobytes() != images[1].tobytes()
    assert measured.images_per_second == pytest.approx(2 / measured.seconds["generate"], rel=1e-3)


@pytest.mark.usefixtures("short_prompts")
def test_a_pipeline_draws_in_the_same_thread_each_time(
    pair: tuple[DeploySpec, list[Any]],
) -> None:
    spec, pipelines = pair
    drew: dict[int, set[int]] = {0: set(), 1: set()}

    def noted(number: int, encode: Callable[..., Any], *given: Any, **named: Any) -> Any:
        drew[number].add(threading.get_ident())
        return encode(*given, **named)

    for number, pipeline in enumerate(pipelines):
        pipeline.encode_prompt = functools.partial(noted, number, pipeline.encode_prompt)
    for _ in range(2):
        generate_each(pipelines, spec.workload.bounds, spec.workload.request)
    for pipeline in pipelines:
        del pipeline.encode_prompt
    assert [len(threads) for threads in drew.values()] == [1, 1]
    assert drew[0].isdisjoint(drew[1])


def test_the_last_seed_is_followed_by_the_first(small: Small) -> None:
    request = small("workload.seed=9223372036854775807").workload.request
    assert [request_of(request, number).seed for number in range(3)] == [2**63 - 1, 0, 1]


@pytest.mark.usefixtures("short_prompts")
def test_where_one_fails_the_others_stop_and_the_failure_is_its_own(pair: tuple[DeploySpec, list[Any]]) -> None:
    spec, pipelines = pair
    failed, steps = threading.Event(), []

    def fail(*_: Any, **__: Any) -> None:
        failed.set()
        raise RuntimeError("the card fell off the bus")

    def slow(done: int, of: int) -> None:
        steps.append(done)
        failed.wait(60)
        time.sleep(0.1)  # for the failure to be known

    pipelines[1].encode_prompt = fail
    bounds = spec.workload.bounds.model_copy(update={"steps": 20})
    with pytest.raises(RunError, match="the card fell off the bus"):
        generate_each(pipelines, bounds, spec.workload.request, slow)
    assert len(steps) < 20


def test_the_command_rehearses_draws_and_reports_all_replicas(here: Here, tiny: Path, tmp_path: Path) -> None:
    small = ("workload.height=64", "workload.width=64", "workload.steps=2")
    done = here("machine=4x24gb", "hardware=multi_gpu_balanced", "hardware.objective=throughput", "output=json", *small)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    plan = said["plan"]
    assert f"4 replicas, ~{plan['images_per_second']:.3g} images/s" in done.stderr
    assert "replicas 0-3" in done.stderr
    assert done.stderr.count("24.00 GiB") >= 8, "planned and rehearsed, every GPU"
    assert "1 of 4 replicas, the others are alike" in done.stderr
    assert [set(one.values()) for one in (said["device_map"], *said["other_device_maps"])] == [
        {f"vgpu:{number}"} for number in range(4)
    ]
    (folder,) = (tmp_path / "outputs").glob("*/*")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('class="bar"') == 4
    assert page.count('aria-label="Replicas"') == 2, "the table and what scrolls it"


def test_the_command_says_what_eight_gpus_draw(here: Here) -> None:
    done = here("model=sana_1600m_controlnet", "machine=8xh100", "hardware.objective=throughput",
                "hardware=multi_gpu_balanced", "until=compile")  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = compile_plan(["model=sana_1600m_controlnet", "machine=8xh100", "hardware.objective=throughput",
                         "hardware=multi_gpu_balanced"])  # fmt: skip
    assert f"8 replicas, ~{plan.images_per_second:.3g} images/s" in done.stderr
    for number in range(8):
        assert f"GPU {number}  " in done.stderr


def test_a_command_that_asks_for_too_many_ends_with_what_fits(here: Here) -> None:
    done = here("model=sana_1600m_controlnet", "machine=4x24gb", "hardware=multi_gpu_balanced", "hardware.replicas=9")
    assert done.returncode == 4
    assert "hardware.replicas: 9 replicas do not fit, 4 do at most" in done.stderr
    assert "hint: this fits: hardware.replicas=4" in done.stderr


def test_the_seeds_of_replicas_are_said_and_their_images_saved(
    here: Here, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pipelines on the CPU take the place of two on GPUs."""
    from sana_deploy.run import replicas

    load = replicas.load_pipelines
    monkeypatch.setattr(replicas, "load_pipelines", lambda *given: [load(*given)[0], load(*given)[0]])
    done = here("workload.height=64", "workload.width=64", "workload.steps=2", "workload.seed=5", "output=json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["images"] == ["image-000.png", "image-001.png"]
    (remark,) = [one for one in said["diagnostics"] if one["type"] == "seeds"]
    assert remark["message"].endswith("image-000.png seed 5, image-001.png seed 6")
    assert said["measured"]["images_per_second"] > 0
    assert "images/s" in done.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*")
    first, second = (Image.open(folder / name).tobytes() for name in said["images"])
    assert first != second


def test_a_sweep_compares_one_image_sooner_with_more_images(here: Here, tmp_path: Path) -> None:
    done = here("-m", "model=sana_1600m_controlnet", "machine=2xl4", "hardware=multi_gpu_balanced",
                "hardware.objective=latency,throughput", "until=compile", COLUMNS="140")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "~images/s" in done.stderr
    (path,) = (tmp_path / "outputs").glob("multirun/*/*/summary.json")
    rows = {row["overrides"]["hardware.objective"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
    assert [rows[name]["replicas"] for name in ("latency", "throughput")] == [1, 2]
    assert rows["throughput"]["images_per_second"] > rows["latency"]["images_per_second"]
    assert rows["throughput"]["estimated_seconds_per_image"] > rows["latency"]["estimated_seconds_per_image"]
    assert rows["throughput"]["front"], "it draws more, and takes more memory"
    assert rows["latency"]["front"]
