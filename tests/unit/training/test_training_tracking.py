"""Numbers of a run reach their files and MLflow, and no server can stall or stop the training."""

from __future__ import annotations

import logging
import math
import socket
import sys
from pathlib import Path

import pytest

from valley.data.settings import DataSettings, SourceSettings
from valley.errors import TrackingError
from valley.training.mlflow_tracker import (
    MlflowRun,
    MlflowTracker,
    check_tracking_uri,
    end_run,
    start_run,
    tracking_uri,
    ui_command,
)
from valley.training.settings import RunSettings, TrackingSettings
from valley.training.tracking import FileTracker, flatten, metric_name, read_curve


def settings(output: Path, **tracking: object) -> RunSettings:
    data = DataSettings(sources=[SourceSettings(path="/data/a.json", root="/data")])
    return RunSettings(output=str(output), data=data, tracking=TrackingSettings.model_validate(tracking))


def test_a_curve_reads_back_and_a_step_taken_twice_counts_once(tmp_path: Path) -> None:
    first = FileTracker(tmp_path / "metrics.jsonl")
    for step, loss in enumerate([4.0, math.nan, 2.0]):
        first.log_metrics(step, {"train/loss": loss})
    first.close()
    again = FileTracker(tmp_path / "metrics.jsonl", first_step=1)
    again.log_metrics(2, {"train/loss": 1.5, "train/grad_norm": 7.0})
    again.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')

    curve = read_curve(tmp_path / "metrics.jsonl", "train/loss")

    assert list(curve) == [0, 1, 2]
    assert (curve[0], curve[2]) == (4.0, 1.5)
    assert math.isnan(curve[1])
    assert read_curve(tmp_path / "metrics.jsonl", "train/grad_norm") == {2: 7.0}


def test_settings_flatten_to_dotted_paths(tmp_path: Path) -> None:
    flat = flatten(settings(tmp_path))

    assert flat["data.sources.0.path"] == "/data/a.json"
    assert flat["train.modules"] == '["temporal", "projector"]'
    assert flat["tracking.uri"] == "null"
    assert flat["train.learning_rate"] == "0.002"


def test_names_that_mlflow_refuses_are_mended() -> None:
    assert metric_name("validation/loss/my data (v2)") == "validation/loss/my data _v2_"


@pytest.mark.parametrize("uri", ["sqlite:////runs/mlflow.db", "file:///runs/mlruns", "/runs/mlruns", "mlruns"])
def test_a_store_on_one_disk_is_refused_for_two_nodes(uri: str) -> None:
    check_tracking_uri(uri, num_nodes=1)
    with pytest.raises(TrackingError, match="2 nodes"):
        check_tracking_uri(uri, num_nodes=2)


@pytest.mark.parametrize("uri", ["http://tracking:5000", "postgresql://u@db/mlflow", "databricks"])
def test_a_server_serves_any_number_of_nodes(uri: str) -> None:
    check_tracking_uri(uri, num_nodes=8)


def test_the_default_store_lies_beside_the_run_folder_by_its_absolute_path(tmp_path: Path) -> None:
    assert tracking_uri(settings(tmp_path / "runs" / "demo")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (
        ui_command("sqlite:////x/mlflow.db")
        == f"{Path(sys.executable).parent}/mlflow ui --backend-store-uri sqlite:////x/mlflow.db"
    )


def test_a_run_on_sqlite_holds_params_points_and_artifacts_under_one_id(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    run = start_run(settings(tmp_path / "demo"))
    assert run is not None
    table = tmp_path / "rejects.txt"
    table.write_text("none")
    for part in range(2):  # a worker, and the worker that took over
        tracker = MlflowTracker(run)
        tracker.log_params({"train.learning_rate": "0.002"})
        for step in range(part * 3, part * 3 + 3):
            tracker.log_metrics(step, {"train/loss": 10.0 - step, "train/grad_norm": math.inf})
        tracker.log_artifact(table, "tables")
        tracker.close()
    end_run(run, "FINISHED")

    client = MlflowClient(tracking_uri=run.uri)
    stored = client.get_run(run.run_id)
    assert stored.data.params == {"train.learning_rate": "0.002"}
    assert [p.value for p in client.get_metric_history(run.run_id, "train/loss")] == [10.0, 9.0, 8.0, 7.0, 6.0, 5.0]
    assert stored.info.status == "FINISHED"
    assert (tmp_path / "mlartifacts" / "valley" / run.run_id / "artifacts" / "tables" / "rejects.txt").is_file()
    assert (tmp_path / "mlflow.db").is_file()
    assert start_run(settings(tmp_path / "demo"), run_id=run.run_id) == run


def test_a_value_the_server_refuses_is_given_up_and_the_rest_arrives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    run = start_run(settings(tmp_path / "demo"))
    assert run is not None
    tracker = MlflowTracker(run)
    tracker.log_metrics(0, {"not (allowed)": 1.0})
    tracker.close()
    tracker = MlflowTracker(run)
    tracker.log_artifact(tmp_path / "missing.png")
    tracker.log_metrics(1, {"train/loss": 2.0})
    tracker.close()

    assert [p.value for p in MlflowClient(run.uri).get_metric_history(run.run_id, "train/loss")] == [2.0]
    assert "refused" in caplog.text


def test_a_server_that_is_gone_costs_points_not_time(caplog: pytest.LogCaptureFixture) -> None:
    tracker = MlflowTracker(MlflowRun(f"http://127.0.0.1:{closed_port()}", "0" * 32), flush_s=0.1, max_points=2_000)

    with caplog.at_level(logging.WARNING):
        for step in range(10_000):
            tracker.log_metrics(step, {"train/loss": 1.0})
        tracker.close()

    # At most one call's worth of points is on its way; all others beyond the bound were dropped and counted.
    assert 10_000 - 2_000 - 1_000 <= tracker.dropped_points <= 10_000 - 2_000
    assert sum("the oldest are dropped" in record.message for record in caplog.records) == 1
    assert sum("did not reach" in record.message for record in caplog.records) == 1


def test_a_server_that_is_gone_stops_a_job_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="cannot be used"):
        start_run(settings(tmp_path, uri=f"http://127.0.0.1:{closed_port()}"))


def test_tracking_switched_off_opens_no_run(tmp_path: Path) -> None:
    assert start_run(settings(tmp_path / "demo", enabled=False), num_nodes=3) is None
    assert not (tmp_path / "mlflow.db").exists()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
