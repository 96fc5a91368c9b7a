"""Whole runs of the pre-training job, from data files to a checkpoint that Hugging Face's classes load."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from e2e_clips import write_clip, write_records
from mlflow import MlflowClient

from valley.config import load_settings
from valley.distributed.train import run_on_ray
from valley.errors import RejectLimitError
from valley.training.job import checkpoints_of
from valley.training.record import read_record
from valley.training.run import run_plain
from valley.training.settings import RunSettings
from valley.training.tracking import read_curve

SUMMARY_KEYS = {
    "loss_first",
    "loss_last",
    "steps",
    "samples",
    "samples_per_s",
    "frames_per_s",
    "rejected",
    "checkpoint",
    "mlflow_run_id",
}


def settings_of(folder: Path, name: str, *words: str) -> RunSettings:
    """The tiny model on the data file in `folder`."""
    source = f"data.sources=[{{path: {folder / 'data.json'}, root: {folder / 'videos'}, name: mine}}]"
    own = [f"output={folder / name}", "engine.overlap_comm=false", "train.global_batch=4", "train.micro_batch=2"]
    return load_settings(RunSettings, "tiny", [source, *own, *words])


def summary_of(settings: RunSettings) -> dict:
    return json.loads((Path(settings.output) / "summary.json").read_text())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "videos").mkdir()
    names = [write_clip(folder / "videos" / f"{index}.mp4", seed=index).name for index in range(10)]
    write_records(folder / "data.json", names)
    return folder


@pytest.fixture(scope="module")
def plain_run(clips: Path) -> RunSettings:
    settings = settings_of(clips, "plain", "cluster.num_workers=0", "engine.name=torch", "train.epochs=3")
    run_plain(settings)
    return settings


def test_a_plain_run_learns_and_leaves_everything_behind(plain_run: RunSettings) -> None:
    summary, folder = summary_of(plain_run), Path(plain_run.output)
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["loss_last"] < summary["loss_first"]
    assert summary["rejected"] == 0
    assert len(read_curve(folder / "metrics.jsonl", "train/loss")) == summary["steps"]
    assert "[[" in (folder / "sample.txt").read_text()
    for name in ("settings.yaml", "rejects.parquet", "loss_curve.png", "answers.json"):
        assert (folder / name).stat().st_size > 0


def test_the_checkpoint_answers_in_a_fresh_process(plain_run: RunSettings) -> None:
    code = """
import sys, numpy as np, valley
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
frames = np.zeros((3, 96, 128, 3), np.uint8)
inputs = processor(text=[prompt], videos=[frames], return_tensors="pt")
generated = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
print("new tokens:", generated.shape[1] - inputs["input_ids"].shape[1])
"""
    checkpoint = summary_of(plain_run)["checkpoint"]
    done = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=True)
    assert "new tokens: 5" in done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_on_ray_with_deepspeed_give_the_plain_runs_losses(clips: Path, plain_run: RunSettings) -> None:
    settings = settings_of(
        clips, "ray", "cluster.num_workers=2", "cluster.cpus_per_worker=0.5", "cluster.max_decoders=2", "train.epochs=3"
    )
    run_on_ray(settings)
    plain = read_curve(Path(plain_run.output) / "metrics.jsonl", "train/loss")
    ray = read_curve(Path(settings.output) / "metrics.jsonl", "train/loss")
    assert list(ray) == list(plain)
    assert list(ray.values()) == pytest.approx(list(plain.values()), abs=1e-3)
    assert summary_of(settings)["samples"] == summary_of(plain_run)["samples"]


def kill_a_worker(curves: Path, step: int) -> None:
    """Kills a training worker, with no chance to tidy up, once so many steps are taken."""
    give_up_s = time.monotonic() + 240
    while not curves.exists() or len(read_curve(curves, "train/loss")) < step:
        if time.monotonic() > give_up_s:
            return
        time.sleep(0.01)
    ours = psutil.Process().children(recursive=True)
    next(process for process in ours if "RayTrainWorker" in process.name() + " ".join(process.cmdline())).kill()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_dies_is_replaced_and_nothing_is_lost(clips: Path, plain_run: RunSettings) -> None:
    words = [
        "cluster.num_workers=[1,2]",
        "cluster.cpus_per_worker=0.5",
        "cluster.max_decoders=2",
        "train.epochs=3",
        "checkpoint.every_steps=2",
    ]
    settings = settings_of(clips, "killed", *words)
    curves = Path(settings.output) / "metrics.jsonl"
    killer = threading.Thread(target=kill_a_worker, args=(curves, 3))
    killer.start()
    run_on_ray(settings)
    killer.join()

    record = read_record(checkpoints_of(settings))
    assert record is not None
    first, second = record.starts
    assert first.step == 0
    assert second.step >= 2
    plain = read_curve(Path(plain_run.output) / "metrics.jsonl", "train/loss")
    assert list(read_curve(curves, "train/loss").values()) == pytest.approx(list(plain.values()), abs=1e-3)
    history = MlflowClient(f"sqlite:///{clips}/mlflow.db").get_metric_history(
        summary_of(settings)["mlflow_run_id"], "run/restarts"
    )
    assert [point.value for point in history] == [0, 1]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_that_loses_a_node_goes_on_with_the_worker_that_is_left(clips: Path, plain_run: RunSettings) -> None:
    words = [
        "cluster.num_workers=[1,2]",
        "cluster.cpus_per_worker=1.5",
        "cluster.max_decoders=2",
        "train.epochs=3",
        "checkpoint.every_steps=2",
        "tracking.enabled=false",
    ]
    settings = settings_of(clips, "lost-node", *words)
    file = clips / "lost-node.json"
    file.write_text(settings.model_dump_json())
    subprocess.run([sys.executable, str(Path(__file__).with_name("lost_node.py")), str(file), "3"], check=True)

    record = read_record(checkpoints_of(settings))
    assert record is not None
    assert [start.num_workers for start in record.starts] == [2, 1]
    assert record.starts[1].step >= 2
    plain = read_curve(Path(plain_run.output) / "metrics.jsonl", "train/loss")
    losses = read_curve(Path(settings.output) / "metrics.jsonl", "train/loss")
    assert list(losses.values()) == pytest.approx(list(plain.values()), abs=1e-3)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_every_worker_runs_into_is_not_tried_again(bad_folder: Path) -> None:
    words = ["data.rejects_grace=3", "data.validation.fraction=0", "tracking.enabled=false"]
    settings = settings_of(
        bad_folder, "refused", "cluster.num_workers=1", "cluster.cpus_per_worker=0.5", "cluster.max_decoders=1", *words
    )
    with pytest.raises(RejectLimitError, match=r"data.max_rejected allows \(5.0%\)"):
        run_on_ray(settings)
    record = read_record(checkpoints_of(settings))
    assert record is not None
    assert len(record.starts) == 1


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good clip and five that cannot be used; the playlist points at a file outside the folder."""
    folder = tmp_path_factory.mktemp("bad")
    videos = folder / "videos"
    videos.mkdir()
    good = write_clip(videos / "good.mp4").read_bytes()
    secret = write_clip(folder / "secret.mp4")
    (videos / "cut.mp4").write_bytes(good[: len(good) // 2])
    (videos / "text.mp4").write_text("this is not a video\n" * 50)
    (videos / "playlist.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    )
    (videos / "empty.mp4").touch()
    names = ["good", "cut", "text", "playlist", "empty", "missing"]
    write_records(folder / "data.json", [f"{name}.mp4" for name in names])
    return folder


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_job_names_bad_files_with_their_reasons_and_goes_on(bad_folder: Path) -> None:
    secret, output = bad_folder / "secret.mp4", bad_folder / "run"
    before = secret.stat().st_atime_ns

    run_job(
        bad_folder,
        f"output={output}",
        "cluster.num_workers=1",
        "cluster.cpus_per_worker=0.5",
        "cluster.max_decoders=1",
        "train.epochs=2",
    )

    rejects = pq.read_table(output / "rejects.parquet").to_pylist()
    errors = {Path(row["path"]).stem: row["error"] for row in rejects}
    assert errors == {
        "cut": "DamagedMediaError",
        "text": "UnsupportedMediaError",
        "playlist": "UnsupportedMediaError",
        "empty": "EmptyMediaError",
        "missing": "MissingMediaError",
    }
    assert secret.stat().st_atime_ns == before
    summary = json.loads((output / "summary.json").read_text())
    assert summary["rejected"] == 5
    assert summary["samples"] > 0
    assert len(read_curve(output / "metrics.jsonl", "memory/object_store_share")) == summary["steps"]
    artifacts = MlflowClient(f"sqlite:///{bad_folder}/mlflow.db").list_artifacts(summary["mlflow_run_id"])
    assert "rejects.parquet" in {artifact.path for artifact in artifacts}


def run_job(folder: Path, *words: str) -> str:
    """`jobs/pretrain.py` in a process of its own, on the tests' cluster; returns what it prints."""
    source = f"data.sources=[{{path: {folder / 'data.json'}, root: {folder / 'videos'}, name: mine}}]"
    small = ["data.validation.fraction=0", "train.global_batch=4", "train.micro_batch=2"]
    command = [sys.executable, "jobs/pretrain.py", "--config", "tiny", source, *small, *words]
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if ray.is_initialized() else {}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | address)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_too_many_bad_files_stop_the_run_with_a_count_by_reason(bad_folder: Path) -> None:
    words = ["cluster.num_workers=0", "engine.name=torch", "data.rejects_grace=3", "data.validation.fraction=0"]
    with pytest.raises(RejectLimitError, match=r"data.max_rejected allows \(5.0%\)"):
        run_plain(settings_of(bad_folder, "limit", *words, "tracking.enabled=false"))


def test_the_plan_tells_what_the_run_will_do(bad_folder: Path) -> None:
    text = run_job(bad_folder, f"output={bad_folder / 'planned'}", "train.epochs=2", "--dry-run")
    assert "MissingMediaError" in text
    assert "UnsupportedMediaError" in text
    assert "projector" in text
    assert "4 steps; 6 samples an epoch" in text
