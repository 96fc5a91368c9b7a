"""A comparison whose driver is killed goes on: what was finished is kept, what was begun goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from comparison_makers import colour_stage

from valley.training.record import read_record

JOB = Path(__file__).parents[2] / "jobs" / "compare.py"


def start(config: Path, log: Path, *words: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(JOB), "--config", str(config), *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_comparison_goes_on_without_repeating_what_is_finished(tmp_path: Path) -> None:
    stage = colour_stage(tmp_path, checkpoint={"every_steps": 8})
    stage["train"]["epochs"] = 8
    output = tmp_path / "runs" / "compared"
    config = tmp_path / "compare.yaml"
    tree = {
        "output": str(output),
        "finetune": stage,
        "evaluation": {"questions": str(tmp_path / "data" / "questions.json"), "device": "cpu"},
        "search": {"model.temporal": ["v1", "v3"]},
        "baselines": {},
        "seeds": [0],
    }
    config.write_text(yaml.safe_dump(tree))
    first, second = (output / "trials" / name for name in ("v1-seed0", "v3-seed0"))
    log = tmp_path / "log"

    driver = start(config, log)
    try:
        while not list((second / "finetune" / "checkpoints").glob("step-*/manifest.json")):
            assert driver.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
    finally:
        children = psutil.Process(driver.pid).children(recursive=True)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        psutil.wait_procs(children, timeout=60)  # Ray's processes end when their driver is gone
    written = (first / "result.json").stat().st_mtime_ns
    assert not (second / "result.json").exists()

    assert start(config, log).wait() == 2
    assert "go on with --resume" in log.read_text()
    assert start(config, log, "--resume").wait() == 0, log.read_text()[-3000:]
    assert (first / "result.json").stat().st_mtime_ns == written
    record = read_record(second / "finetune" / "checkpoints")
    assert record is not None
    assert [start.step > 0 for start in record.starts] == [False, True]
    summary = json.loads((output / "summary.json").read_text())
    assert {trial["trial"] for trial in summary["trials"]} == {"v1-seed0", "v3-seed0"}
    assert summary["registered"]
