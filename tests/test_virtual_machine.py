"""Virtual machines from words, and the sentences that help when the words are wrong."""

from __future__ import annotations

import pytest

from sana_deploy._units import GIB
from sana_deploy.declare.compose import compose_spec, conf_dir
from sana_deploy.declare.spec import VirtualMachine
from sana_deploy.errors import InvalidSpecError
from sana_deploy.facts.known_gpus import KNOWN_GPUS
from sana_deploy.facts.machine import Machine, is_native
from sana_deploy.facts.virtual_machine import describe_machine


def described(*overrides: str) -> Machine:
    spec = compose_spec(["machine=virtual", *overrides])
    assert isinstance(spec.machine, VirtualMachine)
    return describe_machine(spec.machine)


@pytest.mark.parametrize(
    ("gpus", "names"),
    [
        ("2xt4", ["Tesla T4"] * 2),
        ("rtx4090", ["NVIDIA GeForce RTX 4090"]),
        ("'RTX 4090'", ["NVIDIA GeForce RTX 4090"]),
        ("[rtx4090,rtx3060]", ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060"]),
        ("[2xt4,8GiB]", ["Tesla T4", "Tesla T4", "GPU 8GiB"]),
        ("8xh100", ["NVIDIA H100 80GB HBM3"] * 8),
        ("A100 80GB", ["NVIDIA A100-SXM4-80GB"]),
        ("[2xA100 40GB,A100-40GB]", ["NVIDIA A100-SXM4-40GB"] * 3),
        ("NVIDIA A100-SXM4-80GB", ["NVIDIA A100-SXM4-80GB"]),
        ("[T4 16GB,V100 16GB,V100 32GB]", ["Tesla T4", "Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"]),
        ("RTX 4060 Ti 16GB", ["NVIDIA GeForce RTX 4060 Ti"]),
    ],
)
def test_gpus_are_named_counted_and_listed(gpus: str, names: list[str]) -> None:
    machine = described(f"machine.gpus={gpus}")
    assert [gpu.name for gpu in machine.gpus] == names
    assert [gpu.index for gpu in machine.gpus] == list(range(len(names)))


def test_memory_can_be_given_and_part_of_it_declared_used() -> None:
    machine = described("machine.gpus=2x8GiB", "machine.used=[1GiB,500MB]")
    assert [gpu.total_bytes for gpu in machine.gpus] == [8 * GIB] * 2
    assert [gpu.free_bytes for gpu in machine.gpus] == [7 * GIB, 8 * GIB - 500_000_000]
    assert described("machine.gpus=t4", "machine.memory=6GiB").gpus[0].total_bytes == 6 * GIB


@pytest.mark.parametrize(
    ("overrides", "says", "hint"),
    [
        (["machine.gpus=2xrtx306"], "'rtx306' is not a known GPU", "did you mean 'rtx3060'?"),
        (["machine.gpus=[]"], "1 to 16 GPUs (got 0)", "machine.gpus=2xt4"),
        (["machine.gpus=0xt4"], "1 to 16 GPUs (got 0)", ""),
        (["machine.gpus=99xt4"], "1 to 16 GPUs (got 99)", ""),
        (["machine.gpus=t4", "machine.memory=-8GiB"], "cannot be negative", ""),
        (["machine.gpus=t4", "machine.memory=0GiB"], "a GPU has memory (got '0GiB')", "8GiB"),
        (["machine.gpus=A100 24GB"], "'A100 24GB' is not a known GPU", "did you mean 'a100-40gb'?"),
        (["machine.gpus=t4", "machine.memory='8'"], "no size in bytes", "8GiB"),
        (["machine.gpus=t4", "machine.used=20GiB"], "declared used on GPU 0, which has 14.58 GiB", ""),
        (["machine.gpus=2xt4", "machine.used=[1GiB]"], "1 sizes for 2 GPUs", ""),
    ],
)
def test_wrong_words_get_a_sentence_that_helps(overrides: list[str], says: str, hint: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        described(*overrides)
    assert says in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.where.startswith("machine.")


def test_the_table_is_broad_and_sane() -> None:
    assert len(KNOWN_GPUS) >= 30
    for key, gpu in KNOWN_GPUS.items():
        assert gpu.memory_mib > 4000, key
        assert gpu.source, key
        assert gpu.memory_gbps > 100, key
        assert (gpu.tflops_bfloat16 > 0) == (gpu.capability >= (8, 0)), key
        (described_gpu,) = described(f"machine.gpus={key}").gpus
        assert is_native("bfloat16", described_gpu) == (gpu.tflops_bfloat16 > 0), key


@pytest.mark.parametrize("path", sorted((conf_dir() / "machine").glob("*x*.yaml")), ids=lambda path: path.stem)
def test_every_named_machine_has_the_gpus_of_its_name(path: object) -> None:
    name = path.stem  # type: ignore[attr-defined]
    spec = compose_spec([f"machine={name}"])
    assert isinstance(spec.machine, VirtualMachine)
    assert len(describe_machine(spec.machine).gpus) == int(name.partition("x")[0])
