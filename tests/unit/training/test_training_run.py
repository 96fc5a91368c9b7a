"""A whole run in one process: what it writes is whole, and says what happened."""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from training_makers import new_engine, processor, run_settings, write_data

from valley.checkpoints import store
from valley.data.collate import IGNORED, collate
from valley.data.settings import SourceSettings
from valley.errors import RejectLimitError, SettingsError
from valley.media.sampling import Sampling
from valley.model.modeling import ValleyForConditionalGeneration
from valley.training.curve import draw_loss_curve
from valley.training.feed import load_ahead
from valley.training.job import Job, find_sample, job_status, open_job, prepare_job
from valley.training.run import train_rank
from valley.training.settings import ProfileSettings, RunSettings
from valley.training.summary import read_summary
from valley.training.tracking import FileTracker, read_curve
from valley.training.validation import Validator, answer_prompts, append_answers, held_out_slots, load_prompts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """A run of two sources that kept two checkpoints and the best, in bf16, tracked by MLflow."""
    folder = tmp_path_factory.mktemp("run")
    sources = [write_data(folder, "pictures", 12), write_data(folder, "words", 8, pictures=False)]
    settings = run_settings(folder, sources, tracking={"enabled": True}, checkpoint={"every_steps": 2, "keep_last": 2})
    train = settings.train.model_copy(update={"precision": "bf16", "epochs": 2, "learning_rate": 3e-2})
    data = settings.data.model_copy(
        update={"validation": settings.data.validation.model_copy(update={"every_steps": 3, "prompts": 2})}
    )
    settings = settings.model_copy(update={"train": train, "data": data})
    job = open_job(prepare_job(settings))
    with job_status(job):
        train_rank(job, device=torch.device("cpu"))
    return settings


def test_the_run_folder_tells_the_whole_story(finished: RunSettings) -> None:
    folder = Path(finished.output)
    summary, losses = read_summary(folder), read_curve(folder / "metrics.jsonl", "train/loss")

    assert list(losses) == list(range(1, summary["steps"] + 1))
    assert (summary["loss_first"], summary["loss_last"]) == (losses[1], losses[summary["steps"]])
    job = prepare_job(finished)
    assert summary["samples"] == 2 * job.loader.order.samples_per_epoch
    assert summary["rejected"] == 0
    validation = read_curve(folder / "metrics.jsonl", "validation/loss")
    assert set(validation) == {*range(3, summary["steps"], 3), summary["steps"]}
    assert summary["best_validation_loss"] == min(validation.values())
    sources = [read_curve(folder / "metrics.jsonl", f"validation/loss/{name}") for name in ("pictures", "words")]
    assert all(set(curve) == set(validation) for curve in sources)


def test_the_newest_two_checkpoints_and_the_best_remain_and_name_what_is_frozen(finished: RunSettings) -> None:
    folder = Path(finished.output)
    summary = read_summary(folder)
    kept = [step for step, _ in store.steps_in(folder / "checkpoints")]

    assert kept[0] == summary["steps"]
    assert set(kept[2:]) <= {summary["best_step"]}
    newest = store.newest_complete(folder / "checkpoints")
    assert newest is not None
    assert str(newest.path) == summary["training_checkpoint"]
    assert newest.info["position"]["step"] == summary["steps"]
    assert newest.info["mlflow"]["run_id"] == summary["mlflow_run_id"]
    assert set(newest.info["frozen"]) == {"vision", "llm"}
    trained = load_file(newest.rank_folder(0) / "weights.safetensors")
    assert {name.partition(".")[0] for name in trained} == {"temporal", "projector", "added_tokens"}
    assert RunSettings.model_validate(newest.info["settings"]) == finished


def test_the_final_model_is_the_trained_one_in_the_compute_precision(finished: RunSettings) -> None:
    folder = Path(finished.output)
    model = ValleyForConditionalGeneration.from_pretrained(folder / "model")
    newest = store.newest_complete(folder / "checkpoints")
    assert newest is not None
    trained = load_file(newest.rank_folder(0) / "weights.safetensors")

    parameters = dict(model.named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}
    assert all(torch.equal(parameters[name], value.to(torch.bfloat16)) for name, value in trained.items())


def test_mlflow_has_the_curves_the_settings_and_the_files(finished: RunSettings) -> None:
    from mlflow import MlflowClient

    folder = Path(finished.output)
    summary = read_summary(folder)
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    run = client.get_run(summary["mlflow_run_id"])

    assert run.info.status == "FINISHED"
    assert run.data.params["train.global_batch"] == "4"
    points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "train/loss")}
    assert points == read_curve(folder / "metrics.jsonl", "train/loss")
    files = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert files >= {"settings.yaml", "sample.txt", "rejects.parquet", "loss_curve.png", "answers.json", "model"}


def test_answers_stand_beside_questions_and_truth(finished: RunSettings) -> None:
    table = json.loads((Path(finished.output) / "answers.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    steps = read_curve(Path(finished.output) / "metrics.jsonl", "validation/loss")

    assert [row["step"] for row in rows] == [step for step in steps for _ in range(2)]
    for row in rows:
        number = row["sample_id"].partition("-")[2]
        assert number in row["question"]
        assert row["truth"].startswith("number ")
        assert row["truth"].endswith(f" {number}")


def test_a_second_run_in_the_folder_moves_the_firsts_checkpoints_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = prepare_job(run_settings(tmp_path, [write_data(tmp_path, "words", 10, pictures=False)]))
    (job.checkpoints / "step-00000999").mkdir(parents=True)
    (job.folder / "summary.json").write_text('{"loss_last": 0}')

    with caplog.at_level(logging.INFO):
        open_job(job)

    assert [path.name for path in job.checkpoints.iterdir()] == ["run.json"]
    assert (job.folder / "checkpoints.previous" / "step-00000999").is_dir()
    assert not (job.folder / "summary.json").exists()
    assert "[[" in (job.folder / "sample.txt").read_text()
    assert (job.folder / "sample.txt").read_text().strip() in caplog.text


def test_a_run_that_could_learn_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    path.write_text(json.dumps([{"id": "x", "image": "missing.png", "conversations": turns}]))

    with pytest.raises(RejectLimitError, match=r"nothing is supervised(.|\n)*missing\.png"):
        find_sample(prepare_job(run_settings(tmp_path, [path])))


def test_a_remote_run_folder_is_refused_by_name(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, [write_data(tmp_path, "words", 4, pictures=False)], output="s3://bucket/run")
    with pytest.raises(SettingsError, match="output: s3://bucket/run"):
        prepare_job(settings)


@pytest.fixture(scope="module")
def held_out_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("held-out")
    names = [write_data(folder, "pictures", 7), write_data(folder, "words", 6, pictures=False)]
    (folder / "pictures-4.png").write_bytes(b"no picture")
    validation = {"sources": [{"path": str(path)} for path in names]}
    settings = run_settings(folder, names[1:])
    data = settings.data.model_validate(settings.data.model_dump() | {"validation": validation})
    return prepare_job(settings.model_copy(update={"data": data}))


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_validation_is_the_mean_over_tokens_of_each_source_whatever_the_batches(
    held_out_job: Job, micro_batch: int
) -> None:
    engine, loader = new_engine("torch"), held_out_job.held_out
    assert loader is not None
    samples = [loader.load(slot) for slot in held_out_slots(loader, 100).tolist()]
    sums = np.zeros((2, 2))
    for sample in samples:
        one = collate([sample], 0)
        with torch.no_grad():
            logits = engine.model(**one.model_inputs() | {"labels": None}).logits[0, :-1].double()
        targets = one.labels[0, 1:]
        chosen = targets != IGNORED
        losses = -logits.log_softmax(-1)[torch.arange(len(targets)), targets.clamp(min=0)][chosen]
        sums[sample.source] += losses.sum().item(), len(losses)

    found = Validator(engine, loader, load_ahead, pad_id=0, micro_batch=micro_batch, max_samples=100)()

    assert found.num_samples == 13
    assert found.loss == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum(), abs=1e-4)
    expected = dict(zip(["pictures", "words"], sums[:, 0] / sums[:, 1], strict=True))
    assert found.source_losses == pytest.approx(expected, abs=1e-4)
    assert [reject.sample_id for reject in found.rejects] == ["pictures-4"]
    assert engine.model.training


def test_a_smaller_look_is_spread_over_all_held_out_samples_and_always_the_same(held_out_job: Job) -> None:
    loader = held_out_job.held_out
    assert loader is not None
    few = held_out_slots(loader, 4)

    assert few.tolist() == held_out_slots(loader, 4).tolist()
    assert (few[0], few[-1]) == (0, held_out_slots(loader, 100)[-1])
    assert len(set(few.tolist())) == 4


def test_prompts_end_where_the_answer_begins(held_out_job: Job, tmp_path: Path) -> None:
    engine, loader = new_engine("torch"), held_out_job.held_out
    assert loader is not None
    prompts = load_prompts(loader, 5)

    answers = answer_prompts(engine, processor(), prompts, step=7)
    append_answers(tmp_path / "answers.json", answers)
    append_answers(tmp_path / "answers.json", answers[:1])

    for prompt in prompts:
        assert (prompt.sample.labels[: prompt.begin] == IGNORED).all()
        assert (prompt.sample.labels[prompt.begin : prompt.end] != IGNORED).all()
    table = json.loads((tmp_path / "answers.json").read_text())
    assert len(table["data"]) == len(answers) + 1 == 6
    assert engine.model.training


def test_the_curve_is_drawn_with_gaps_where_the_loss_was_not_finite(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path / "metrics.jsonl")
    for step, loss in enumerate([3.0, float("nan"), 2.0, float("inf"), 1.0], start=1):
        tracker.log_metrics(step, {"train/loss": loss, "validation/loss": loss})
    tracker.close()

    draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", "a run")

    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_rejects_of_all_kinds_end_in_one_table(tmp_path: Path) -> None:
    path = write_data(tmp_path, "pictures", 12)
    records = json.loads(path.read_text())
    records[3]["conversations"] = "none"
    path.write_text(json.dumps(records))
    (tmp_path / "pictures-2.png").write_bytes(b"")
    settings = run_settings(tmp_path, [path])
    data = settings.data.model_copy(update={"validation": settings.data.validation.model_copy(update={"fraction": 0})})
    job = open_job(prepare_job(settings.model_copy(update={"data": data})))

    train_rank(replace(job, total_steps=3), device=torch.device("cpu"))

    rows = pq.read_table(job.folder / "rejects.parquet").to_pylist()
    assert {row["sample_id"]: (row["stage"], row["error"]) for row in rows} == {
        "pictures-3": ("parse", "RecordError"),
        "pictures-2": ("decode", "EmptyMediaError"),
    }
    assert read_summary(job.folder)["rejected"] == len(rows)


def test_validation_without_a_usable_sample_stops_the_run_and_says_why(tmp_path: Path) -> None:
    words = write_data(tmp_path, "words", 8, pictures=False)
    lost = write_data(tmp_path, "lost", 4)
    for picture in tmp_path.glob("lost-*.png"):
        picture.unlink()
    lost.write_text(json.dumps([record for record in json.loads(lost.read_text()) if "image" in record]))
    settings = run_settings(tmp_path, [words])
    validation = settings.data.validation.model_copy(update={"sources": [SourceSettings(path=str(lost))]})
    data = settings.data.model_copy(update={"validation": validation})
    job = open_job(prepare_job(settings.model_copy(update={"data": data})))

    with pytest.raises(RejectLimitError, match="none of the held-out samples can be used"):
        train_rank(job, device=torch.device("cpu"))

    rows = pq.read_table(job.folder / "rejects.parquet").to_pylist()
    assert {row["sample_id"] for row in rows} == {"lost-0", "lost-2"}
    assert len(rows) == 2


def test_a_table_of_known_rejects_that_is_not_there_is_refused(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, [write_data(tmp_path, "words", 4, pictures=False)])
    data = settings.data.model_copy(update={"known_rejects": str(tmp_path / "none.parquet")})
    with pytest.raises(SettingsError, match=r"data\.known_rejects: .*none\.parquet: no such file"):
        prepare_job(settings.model_copy(update={"data": data}))


def test_the_loader_frames_pictures_as_the_processor_says(tmp_path: Path) -> None:
    job = prepare_job(run_settings(tmp_path, [write_data(tmp_path, "words", 4, pictures=False)]))
    framing = {name: getattr(job.loader, name) for name in job.processor.framing}
    assert framing == job.processor.framing == {"size_px": 56, "interpolation": "bicubic", "resize_mode": "shortest"}


def test_the_saved_processor_knows_which_source_was_sampled_otherwise(tmp_path: Path) -> None:
    sources = [write_data(tmp_path, name, 4, pictures=False) for name in ("usual", "dense")]
    settings = run_settings(tmp_path, sources)
    dense = settings.data.sources[1].model_copy(update={"sampling": Sampling(mode="fixed", num_frames=5)})
    data = settings.data.model_copy(update={"sources": [settings.data.sources[0], dense]})

    job = prepare_job(settings.model_copy(update={"data": data}))

    assert job.processor.source_sampling == {"dense": Sampling(mode="fixed", num_frames=5)}


def test_sources_that_all_weigh_nothing_are_refused(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, [write_data(tmp_path, "words", 4, pictures=False)])
    nothing = settings.data.sources[0].model_copy(update={"weight": 0.0})
    data = settings.data.model_copy(update={"sources": [nothing]})
    with pytest.raises(SettingsError, match=r"data\.sources: every weight is 0"):
        prepare_job(settings.model_copy(update={"data": data}))


def test_a_profile_shows_the_steps_asked_for_and_what_they_ran(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, [write_data(tmp_path, "words", 20, pictures=False)])
    settings = settings.model_copy(update={"profile": ProfileSettings(after=1, steps=2)})

    train_rank(open_job(prepare_job(settings)), device=torch.device("cpu"))

    with gzip.open(Path(settings.output) / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    # The first step passes, the second warms the profiler up.
    assert {name for event in events if (name := event["name"]).startswith("ProfilerStep")} == {
        "ProfilerStep#2",
        "ProfilerStep#3",
    }
    assert any("backward" in event["name"].lower() for event in events)
    assert "aten::" in (Path(settings.output) / "profile" / "operators.txt").read_text()
