"""Price tables: the one that ships has days and sources, catalogues are read, faults have a line and a column."""

from __future__ import annotations

import csv
import os
from datetime import date
from pathlib import Path

import pytest

from sana_deploy.advise.gpu_names import known_gpu
from sana_deploy.advise.prices import SHIPPED, read_prices
from sana_deploy.errors import InputError

TITLES = "provider,instance,gpu,gpu_count,gpu_memory_gb,usd_per_hour,region,spot,date,source"
GOOD = "aws,g6.xlarge,L4,1,24,0.8048,us-east-1,no,2026-01-19,there"
SKYPILOT = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice
cpu_4x,,,4.0,16.0,0.2,us-east-1,,
gpu_4x_a6000,A6000,4.0,56.0,400.0,4.36,asia,"{'Gpus': [{'Name': 'A6000', 'MemoryInfo': {'SizeInMiB': 49152}}]}",2.0
gpu_4x_a6000,A6000,4.0,56.0,400.0,4.0,europe,"{'Gpus': [{'Name': 'A6000', 'MemoryInfo': {'SizeInMiB': 49152}}]}",
gpu_8x_a100,A100-80GB-SXM,8.0,88.0,448.0,9.5,us,"{""Gpus"": [{""MemoryInfo"": {""SizeInMiB"": 80}}]}",
half,L4,0.5,2.0,8.0,0.3,us,,
box,MI300X,8.0,88.0,448.0,20,us,,
spot-only,L4,1.0,4.0,16.0,,us,,0.2
"""
GPUHUNT = """\
instance_name,location,price,cpu,memory,gpu_count,gpu_name,gpu_memory,spot,disk_size
a2,us-east1,3.67,12,85,1,A100,40,False,
a2-ultra,us-east1,5.07,12,170,1,A100,80,False,
a2-ultra,us-east1,2.5,12,170,1,A100,80,True,
n1,us-east1,0.1,2,8,0,,,False,
"""


def written(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_price_that_ships_has_a_day_a_source_and_a_known_gpu() -> None:
    with SHIPPED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert 40 <= len(rows) <= 80
    table = read_prices(spot=True)
    assert (len(table.prices), table.rows, table.unknown) == (len(rows), len(rows), {}), "none twice, none left out"
    words = {one.word for one in table.prices}
    assert words >= {"t4", "l4", "a10g", "a100-40gb", "a100", "l40s", "h100", "h200", "rtx3090", "rtx4090"}
    for one in table.prices:
        assert date(2026, 1, 1) <= one.date <= date(2026, 12, 31)
        assert one.source.startswith("https://github.com/")
        assert len(one.source.split("/blob/")[1].partition("/")[0]) == 40, "a commit, so that the page stays as it was"
        assert 0.1 < one.usd_per_hour / one.gpu_count < 20
    assert table.dates == f"{min(one.date for one in table.prices)} to {max(one.date for one in table.prices)}"


def test_a_catalogue_of_skypilot_is_read_at_the_cheapest_price_of_each_machine(tmp_path: Path) -> None:
    path = written(tmp_path, "lambda/vms.csv", SKYPILOT)
    os.utime(path, (1_767_225_600, 1_767_225_600))
    table = read_prices(path)
    assert [(one.name, one.gpus, one.usd_per_hour, one.region) for one in table.prices] == [
        ("lambda gpu_4x_a6000", "4xrtxa6000", 4.0, "europe"),
        ("lambda gpu_8x_a100", "8xa100", 9.5, "us"),
    ]
    assert table.unknown == {"MI300X": 1}
    assert (table.dates, table.prices[0].source) == ("2026-01-01", f"{path}, line 4"), "the day of the file"
    spot = [one for one in read_prices(path, spot=True).prices if one.spot]
    assert [(one.instance, one.usd_per_hour) for one in spot] == [("gpu_4x_a6000", 2.0), ("spot-only", 0.2)]


def test_a_size_of_all_gpus_together_is_shared_and_a_gpu_without_a_machine_is_left_out(tmp_path: Path) -> None:
    rows = [
        """two,A100,2,8,64,1.5,eu,"{'Gpus': [{'MemoryInfo': {'SizeInMiB': 81920}}]}",0.00""",
        """,A100,1,,,1.0,us,"{'Gpus': [{'MemoryInfo': {'SizeInMiB': 40960}}]}",0.5""",
    ]
    path = written(tmp_path, "vast/vms.csv", "\n".join([SKYPILOT.splitlines()[0], *rows]) + "\n")
    assert [(one.instance, one.gpus) for one in read_prices(path, spot=True).prices] == [("two", "2xa100-40gb")]


def test_a_field_of_boundless_length_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "prices.csv", f"{TITLES}\n{'x' * 200_000}\n")
    with pytest.raises(InputError, match="line 2: field larger than field limit"):
        read_prices(path)


def test_a_catalogue_of_gpuhunt_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "gcp.csv", GPUHUNT)
    assert [(one.name, one.gpus, one.usd_per_hour) for one in read_prices(path, spot=True).prices] == [
        ("gcp a2", "1xa100-40gb", 3.67),
        ("gcp a2-ultra", "1xa100", 5.07),
        ("gcp a2-ultra (spot)", "1xa100", 2.5),
    ]


@pytest.mark.parametrize(
    ("name", "memory", "word"),
    [
        ("A100", 40, "a100-40gb"), ("A100", 80, "a100"), ("A100", None, "a100-40gb"), ("A100-80GB-SXM", None, "a100"),
        ("V100", 16, "v100"), ("V100-32GB", None, "v100-32gb"), ("H100-SXM", 80, "h100"),
        ("H100-PCIE", 80, "h100-pcie"),
        ("RTX6000-Ada", 48, "rtx6000ada"), ("A6000", 48, "rtxa6000"), ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("B200", 192, "b200"), ("L4", 24, "l4"), ("L4", 48, None), ("H100-NVL", 94, None), ("MI300X", 192, None),
        ("tpu-v5p-8", None, None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_names_of_catalogues(name: str, memory: float | None, word: str | None) -> None:
    assert known_gpu(name, memory) == word


def changed(**values: str) -> str:
    row = dict(zip(TITLES.split(","), GOOD.split(","), strict=True)) | values
    return ",".join(row.values())


@pytest.mark.parametrize(
    ("row", "where", "why"),
    [
        (changed(usd_per_hour="cheap"), "line 3, column usd_per_hour", "a number above 0 is needed, got 'cheap'"),
        (changed(usd_per_hour="-1"), "line 3, column usd_per_hour", "got '-1'"),
        (changed(usd_per_hour="nan"), "line 3, column usd_per_hour", "got 'nan'"),
        (changed(gpu_count="1.5"), "line 3, column gpu_count", "a whole number is needed, got '1.5'"),
        (changed(gpu_count=""), "line 3, column gpu_count", "got ''"),
        (changed(spot="maybe"), "line 3, column spot", "yes or no is needed, got 'maybe'"),
        (changed(date="yesterday"), "line 3, column date", "a day reads 2026-01-31, got 'yesterday'"),
        (changed(date="2026-02-30"), "line 3, column date", "there is no day 2026-02-30"),
        (changed(source=" "), "line 3, column source", "a value is needed"),
        (f"{GOOD},more", "line 3", "11 values for 10 columns"),
    ],
)
def test_a_fault_of_a_table_is_named_with_its_line_and_column(tmp_path: Path, row: str, where: str, why: str) -> None:
    path = written(tmp_path, "prices.csv", f"{TITLES}\n{GOOD}\n{row}\n")
    with pytest.raises(InputError) as caught:
        read_prices(path)
    assert str(caught.value) == f"advise.prices: {path}, {where}: {caught.value.message.rpartition(f'{where}: ')[2]}"
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why", "hint"),
    [
        ("name,price\n", "line 1: the columns of", "columns of SkyPilot's catalogue and of gpuhunt's are read too"),
        ("", "line 1: the columns of", "ours are provider,instance,gpu"),
        (f"{TITLES}\n", "has no machine with a known GPU", "a known GPU is one of machine.gpus"),
        (f"{TITLES}\n{changed(gpu='MI300X')}\n", "has no machine with a known GPU", "e.g. T4"),
        (f"{TITLES}\n{changed(spot='yes')}\n", "has spot prices only", "advise.spot=true counts those"),
    ],
)
def test_a_table_that_says_nothing_of_use_is_refused(tmp_path: Path, text: str, why: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        read_prices(written(tmp_path, "prices.csv", text))
    assert why in str(caught.value)
    assert hint in caught.value.hint


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"provider\xff")
    for path, why in (("none.csv", "there is no such file"), ("latin.csv", "is not UTF-8: byte 8"), (".", "directory")):
        with pytest.raises(InputError, match=why):
            read_prices(str(tmp_path / path))
