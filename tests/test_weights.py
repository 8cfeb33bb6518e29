"""Loading: what diffusers and transformers load, bit for bit, read once, concurrently, and cancelled cleanly."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sana_deploy.api import compile_spec
from sana_deploy.declare.formats import Format
from sana_deploy.declare.pipelines import COMPONENTS, SANA_CONTROLNET, Component
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import CheckpointError, RunError
from sana_deploy.facts.component import component_facts
from sana_deploy.run import weights
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.weights import LoadRequest, load_components

Small = Callable[..., DeploySpec]


def wanted(folder: Path, dtype: torch.dtype) -> dict[Component, LoadRequest]:
    form = Format(str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
    return {
        part.name: LoadRequest(component_facts(part, folder / part.name, None, part.name), form, "cpu")
        for part in SANA_CONTROLNET.components
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_modules_are_those_of_from_pretrained_bit_for_bit(
    tiny: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_by_library", None)  # the fallback is not taken
    for name, ours in load_components(wanted(tiny, dtype)).items():
        library = transformers if name == "text_encoder" else diffusers
        theirs = getattr(library, type(ours).__name__).from_pretrained(str(tiny / name), dtype=dtype)
        assert type(ours) is type(theirs)
        assert not ours.training
        mine = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
        yours = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
        assert mine.keys() == yours.keys()
        for key, value in yours.items():
            assert mine[key].dtype == value.dtype, key
            assert mine[key].requires_grad == value.requires_grad, key
            assert torch.equal(mine[key], value), key
        parts: tuple[Any, Any] = (ours, theirs)
        configs = [part.config.to_dict() if name == "text_encoder" else dict(part.config) for part in parts]
        assert configs[0] == configs[1]


def test_a_tensor_stored_in_its_dtype_is_not_copied(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    module = load_components({"transformer": wanted(folder, torch.float32)["transformer"]})["transformer"]
    (path,) = (folder / "transformer").glob("*.safetensors")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    mapped = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(str(path))]
    ranges = [(int(start, 16), int(end, 16)) for start, end in mapped]
    for name, value in module.state_dict().items():
        assert any(start <= value.data_ptr() < end for start, end in ranges), f"{name} is not in the file's memory map"


def test_progress_reaches_the_bytes_of_every_component(tiny: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {name: [] for name in COMPONENTS}
    load_components(wanted(tiny, torch.float32), lambda name, done, of: told[name].append((done, of)))
    for name, steps in told.items():
        assert steps[-1][0] == steps[-1][1] > 0, name
        assert steps == sorted(steps)


def test_other_names_in_a_file_go_to_the_library(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    prefixed = {f"model.{key}": value for key, value in load_file(path).items()}
    save_file(prefixed, path, metadata={"format": "pt"})
    ours = load_components({"text_encoder": wanted(folder, torch.float32)["text_encoder"]})["text_encoder"]
    plain = load_components({"text_encoder": wanted(tiny, torch.float32)["text_encoder"]})["text_encoder"]
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in ours.state_dict().items())


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def rewritten(tiny: Path, folder: Path, component: Component, change: Change, pickled: bool = False) -> LoadRequest:
    """A component whose files were changed after their headers were read."""
    copy = Path(shutil.copytree(tiny / component, folder / component))
    (path,) = copy.glob("*.safetensors")
    tensors = load_file(path)
    facts = replace(component_facts(SANA_CONTROLNET.by_name[component], copy, None, component), allow_pickle=pickled)
    if pickled:
        path.unlink()
        torch.save(change(tensors), path.with_suffix(".bin"))
    else:
        save_file({key: value.contiguous() for key, value in change(tensors).items()}, path, {"format": "pt"})
    return LoadRequest(facts, Format("float32"), "cpu")


def lacking(name: str, prefix: str = "") -> Change:
    return lambda tensors: {f"{prefix}{key}": value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("component", "name", "prefix", "pickled"),
    [
        ("transformer", "transformer_blocks.0.attn1.to_k.weight", "", False),
        ("vae", "decoder.norm_out.bias", "", False),
        ("controlnet", "input_block.weight", "", True),
        ("text_encoder", "norm.weight", "", False),
        ("text_encoder", "layers.3.mlp.up_proj.weight", "model.", False),
    ],
)
def test_a_tensor_that_no_file_holds_is_never_left_at_random(
    tiny: Path, tmp_path: Path, component: Component, name: str, prefix: str, pickled: bool
) -> None:
    one = rewritten(tiny, tmp_path, component, lacking(name, prefix), pickled)
    with pytest.raises(CheckpointError, match=re.escape(f"missing ({name})")) as caught:
        load_components({component: one})
    assert caught.value.exit_code == 3


def test_a_tensor_of_another_shape_is_named_with_both(tiny: Path, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "proj_out.weight": tensors["proj_out.weight"][:, :7]}

    with pytest.raises(CheckpointError, match=r"1 of another shape \(proj_out.weight is 32x7, expected 32x192\)"):
        load_components({"transformer": rewritten(tiny, tmp_path, "transformer", narrow)})


def test_a_buffer_that_nothing_filled_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = weights._build

    def with_a_buffer(*given: Any) -> torch.nn.Module:
        module = build(*given)
        module.register_buffer("positions", torch.empty(3, device="meta"), persistent=False)
        return module

    monkeypatch.setattr(weights, "_build", with_a_buffer)
    with pytest.raises(CheckpointError, match=r"1 of \d+ missing \(positions\)"):
        load_components({"vae": wanted(tiny, torch.float32)["vae"]})


def test_a_failure_names_the_file_and_stops_the_others(
    tiny: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    spec = small("precision=fp32", "model=checkpoint", f"model.source={folder}")
    plan = compile_spec(spec)
    (path,) = (folder / "vae").glob("*.safetensors")
    read: list[str] = []
    plain, unreadable, stopped = weights._assign, weights._unreadable, threading.Event()

    def assign(module: torch.nn.Module, key: str, value: torch.Tensor) -> None:
        if isinstance(module, diffusers.AutoencoderDC):
            raise OSError("made to fail")
        assert stopped.wait(60), "the others were not told to stop"
        read.append(key)
        plain(module, key, value)

    def refused(*arguments: Any) -> RunError:
        stopped.set()  # after the others were told
        return unreadable(*arguments)

    monkeypatch.setattr(weights, "_assign", assign)
    monkeypatch.setattr(weights, "_unreadable", refused)
    with pytest.raises(RunError, match=r"vae could not be loaded from .*made to fail") as caught:
        load_pipeline(plan)
    assert caught.value.exit_code == 6
    assert caught.value.facts["file"] == str(path)
    assert len(read) <= len(COMPONENTS) - 1, "each of the others ended with the tensor at hand"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]
    monkeypatch.setattr(weights, "_unreadable", unreadable)
    monkeypatch.setattr(weights, "_assign", plain)
    assert load_pipeline(plan).vae.dtype == torch.float32
