"""Out of memory: decode is tried again in bands and in tiles, anything else says where, and what would fit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_deploy._units import MIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.plan.remedies import roomier
from sana_deploy.rehearsal.rehearse import open_host, rehearse_request
from sana_deploy.run.decode_retry import vae_settings
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.rows.one_device import bands_of

Small = Callable[..., DeploySpec]
ONE = ["machine=virtual", "machine.gpus=rtx4090", "hardware=single_gpu", "precision=fp32", "machine.fidelity=shapes",
       "runtime=eager"]  # fmt: skip


def run_short_of_memory(small: Small, place: str, spare: int, *overrides: str) -> tuple[Any, Any, RequestState]:
    """Rehearse with a GPU that has only `spare` bytes left once `place` is entered: pipeline, request and its state."""
    resolved = compile_spec(small(*ONE, *overrides)).resolve()
    host = open_host(resolved)
    pipeline = load_pipeline(resolved, host=host)
    border = border_of(pipeline)

    def shrink(event: str, at: str) -> None:
        if (event, at) == ("enter", place):
            host.ledger.capacities[0] = host.ledger.live(0) + spare

    border.observers.append(shrink)
    state = RequestState()
    return pipeline, lambda: rehearse_request(pipeline, resolved, host, state=state), state


LARGE = ["workload.height=2048", "workload.width=1536", "workload.steps=1"]


def test_decode_is_done_again_in_bands_first_and_said_aloud(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, run, state = run_short_of_memory(small, "vae.decode", 300 * MIB, *LARGE)
    before = vae_settings(pipeline.vae)
    assert run().report.gpus[0].phase == "prepare"
    (remark,) = state.remarks
    assert remark in caplog.text
    assert remark == "the VAE ran out of memory in decode: decoded again in 16 bands of rows"
    assert vae_settings(pipeline.vae) == before, "for this once"


def test_decode_is_done_in_tiles_where_bands_do_not_help(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, run, state = run_short_of_memory(small, "vae.decode", 200 * MIB, *LARGE)
    before = vae_settings(pipeline.vae)
    run()
    assert [remark.partition("decoded again in ")[2] for remark in state.remarks] == [
        "16 bands of rows",
        "tiles of 1024 px, stride 896",
    ]
    assert vae_settings(pipeline.vae) == before


def test_a_plan_in_bands_is_tried_in_more_of_them_and_never_in_tiles_where_pixels_must_stay(small: Small) -> None:
    wanted = ["hardware.on_decode_oom=bands", "hardware=custom_map", "hardware.knobs=[vae_bands]"]
    where = "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}"
    pipeline, run, state = run_short_of_memory(small, "vae.decode", 260 * MIB, *LARGE, *wanted, where)
    assert bands_of(pipeline.vae) == 2
    run()
    assert [remark.partition("decoded again in ")[2] for remark in state.remarks] == ["16 bands of rows"]
    assert bands_of(pipeline.vae) == 2, "for this once"
    _, run, state = run_short_of_memory(small, "vae.decode", 200 * MIB, *LARGE, *wanted, where)
    with pytest.raises(RunError, match="in vae during decode"):
        run()
    assert len(state.remarks) == 1


def test_an_image_of_one_tile_takes_smaller_tiles_and_names_the_risk(small: Small) -> None:
    size = ["workload.height=1024", "workload.width=1024", "workload.steps=1"]
    _, run, state = run_short_of_memory(small, "vae.decode", 60 * MIB, *size)
    run()
    assert "tiles of 512 px, stride 384; tiles this small may show" in state.remarks[1]


@pytest.mark.parametrize("spare", [200 * MIB, MIB])
def test_decode_fails_where_tiles_are_not_wanted_or_do_not_help(small: Small, spare: int) -> None:
    wanted = ["hardware.on_decode_oom=raise"] if spare > MIB else []
    _, run, _ = run_short_of_memory(small, "vae.decode", spare, *LARGE, *wanted)
    with pytest.raises(RunError, match=r"out of memory on vgpu:0, in vae during decode; the plan expected") as caught:
        run()
    assert caught.value.exit_code == 6
    assert caught.value.facts["component"] == "vae"


@pytest.mark.parametrize(
    ("place", "where"),
    [("text_encoder.forward", "text_encoder during encode"), ("transformer.forward", "transformer during denoise")],
)
def test_anywhere_else_the_component_and_the_plan_are_named(small: Small, place: str, where: str) -> None:
    _, run, state = run_short_of_memory(small, place, MIB)
    with pytest.raises(RunError, match=f"in {where}; the plan expected .* there at most, of 23.65 GiB that were free"):
        run()
    assert state.remarks == []


def test_the_hint_is_a_plan_that_needs_less(small: Small) -> None:
    large = ["model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024", "machine=virtual"]
    plan = compile_spec(
        small(*large, "machine.gpus=2x12GiB", "hardware=single_gpu", "hardware.allow=[text_encoder_offload]")
    )
    assert roomier(plan, compile_spec) == "", "nothing else is allowed"
    plan = compile_spec(small(*large, "machine.gpus=2x8GiB", "hardware.allow=[vae_slicing,split_controlnet]"))
    hint = roomier(plan, compile_spec)
    override, _, words = hint.partition(" plans ")
    changed = compile_spec(
        small(*large, "machine.gpus=2x8GiB", "hardware.allow=[vae_slicing,split_controlnet]", override)
    )
    assert max(slot.peak_bytes for slot in changed.slots) < max(slot.peak_bytes for slot in plan.slots), words


def test_a_forced_map_ends_with_6_and_the_knobs_that_help(
    here: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    ended = here(
        "model=sana_1600m_controlnet", "machine=virtual", "machine.gpus=12GiB", "hardware=custom_map",
        "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}", "hardware.force=true",
        "hardware.knobs=[]",
    )  # fmt: skip
    assert ended.returncode == 6, ended.stderr
    assert "warning: hardware.force: expected to run out of memory, and forced: GPU 0 needs" in ended.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*")
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["error"]["facts"]["component"] == "vae"
    assert outcome["error"]["hint"].startswith("hardware.knobs=[encode_once] plans")
