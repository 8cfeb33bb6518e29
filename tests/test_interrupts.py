"""An interrupt ends the command with 130, whatever a library makes of the exception."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import os, signal, sys, time
from hydra.errors import ConfigCompositionException
from sana_deploy import __main__ as command, stages

def interrupted(*_, **__):
    try:
        os.kill(os.getpid(), {how})
        time.sleep(60)
    except KeyboardInterrupt:
        {then}

{where} = interrupted
sys.argv[1:] = ["until=compile", "machine=2xt4", "precision=fp16", "model=sana_600m_controlnet"]
command.main()
"""
BECOMES = ("raise", "raise AttributeError('_content')", "raise ConfigCompositionException()", "pass")


def ended(folder: Path, how: signal.Signals, where: str, then: str) -> subprocess.CompletedProcess[str]:
    script = COMMAND.format(how=int(how), where=where, then=then)
    return subprocess.run([sys.executable, "-c", script], cwd=folder, env={**os.environ}, capture_output=True,
                          text=True, timeout=60)  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("then", BECOMES)
def test_an_interrupt_while_hydra_composes(tmp_path: Path, how: signal.Signals, then: str) -> None:
    run = ended(tmp_path, how, "command._job", then)
    assert (run.returncode, run.stderr.strip()) == (130, "interrupted")


@pytest.mark.parametrize("then", BECOMES)
def test_an_interrupt_within_a_stage(tmp_path: Path, then: str) -> None:
    run = ended(tmp_path, signal.SIGTERM, "stages.compile_spec", then)
    assert run.returncode == 130, run.stderr
    assert run.stderr.strip().splitlines()[-1] == "interrupted"
    (outcome,) = (tmp_path / "outputs").rglob("outcome.json")
    told = json.loads(outcome.read_text())
    assert told["status"] == "failed"
    assert (told["exit_code"], told["error"]["type"]) == (130, "KeyboardInterrupt")
    assert told["error"]["message"] == "interrupted"
