"""A comparison on Ray: trials run once, share a store, and leave a report, MLflow runs and a registered model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comparison_makers import colour_stage
from mlflow import MlflowClient

from valley.comparison.settings import CompareSettings
from valley.config import validate
from valley.distributed.compare import compare_on_ray
from valley.errors import ComparisonError
from valley.training.tracking import read_curve

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def settings_in(folder: Path, stage: dict[str, Any] | None = None, **changes: Any) -> CompareSettings:
    stage = stage or colour_stage(folder)
    tree = {
        "output": str(folder / "runs" / "compared"),
        "finetune": stage,
        "evaluation": {"questions": str(folder / "data" / "questions.json"), "device": "cpu"},
        "search": {"model.temporal": ["v1", "v3"]},
        "seeds": [0],
        "baselines": {"text only": {"data.blind": True}},
        "concurrent": 2,
        **changes,
    }
    return validate(CompareSettings, tree)


def summary_of(settings: CompareSettings) -> dict[str, Any]:
    return json.loads((Path(settings.output) / "summary.json").read_text())


def test_trials_share_a_store_and_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    text = compare_on_ray(settings)
    folder = Path(settings.output)
    trials = folder / "trials"
    assert "| v3 |" in text
    store = json.loads(next((folder / "features").glob("*/summary.json")).read_text())
    assert (store["files"], store["clips"]) == (80, 80)
    for trial in ("v1-seed0", "v3-seed0", "text-only-seed0"):
        assert (trials / trial / "result.json").exists()
    frames = {
        name: json.loads((trials / name / "summary.json").read_text())["frames"]
        for name in ("v1-seed0", "text-only-seed0")
    }
    assert frames == {"v1-seed0": 256, "text-only-seed0": 0}
    assert list(read_curve(trials / "v1-seed0" / "finetune" / "metrics.jsonl", "validation/accuracy")) == [
        8,
        16,
        24,
        32,
    ]

    first = summary_of(settings)
    assert first["accuracy"]["v1"]["all"] > 0.6 > first["accuracy"]["text only"]["all"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    parent = client.get_run(first["mlflow_run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_name for run in children} == {"v1-seed0", "v3-seed0", "text-only-seed0"}
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    by_name = {run.info.run_name: run.data for run in children}
    assert by_name["v3-seed0"].params["model.temporal"] == "v3"
    assert by_name["v1-seed0"].metrics["accuracy"] == pytest.approx(first["accuracy"]["v1"]["all"])
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"report.html", "accuracy_by_kind.png"}
    best = client.get_model_version_by_alias("valley", "best")
    assert best.tags["variant"] == first["best"].removesuffix("-seed0")
    assert {file.path for file in client.list_artifacts(best.run_id)} >= {"model", "finetune"}
    assert [file.path for file in client.list_artifacts(best.run_id, "finetune")] == ["finetune/settings.yaml"]

    results = {path: path.stat().st_mtime_ns for path in trials.glob("*/result.json")}
    more = settings.model_copy(update={"resume": True, "seeds": [0, 1]})
    compare_on_ray(more)
    assert all(path.stat().st_mtime_ns == written for path, written in results.items())
    assert len(list(trials.glob("*/result.json"))) == 5
    second = summary_of(settings)
    assert second["mlflow_run_id"] == first["mlflow_run_id"]
    assert {trial["trial"] for trial in second["trials"]} == {
        *(path.parent.name for path in results),
        "v1-seed1",
        "v3-seed1",
    }


def test_a_trial_that_fails_is_named_and_the_others_are_finished(tmp_path: Path) -> None:
    search = {"model.temporal": ["v1"], "finetune.model.path": [None, str(tmp_path / "nowhere")]}
    settings = settings_in(tmp_path, search=search, baselines={}, share_features=False)
    with pytest.raises(ComparisonError, match=r"1 trial\(s\) failed.*\n.*nowhere"):
        compare_on_ray(settings)
    assert "path=None" in (Path(settings.output) / "report.md").read_text()


@pytest.mark.slow
def test_trials_that_are_behind_are_stopped_and_marked(tmp_path: Path) -> None:
    rates = [3e-3, 1e-7, 1e-8, 1e-9]
    settings = settings_in(
        tmp_path,
        search={"finetune.train.learning_rate": rates},
        baselines={},
        stopping={"grace": 2, "reduction": 2},
        concurrent=1,
    )
    compare_on_ray(settings)
    summary = summary_of(settings)
    assert 1 <= len(summary["stopped"]) <= 3
    assert summary["best"] == "learning_rate=0.003-seed0"
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("valley")
    assert experiment is not None
    killed = client.search_runs([experiment.experiment_id], "attributes.status = 'KILLED'")
    assert {run.info.run_name for run in killed} >= set(summary["stopped"])


@pytest.mark.slow
def test_trials_that_train_on_ray_themselves_get_their_share(tmp_path: Path) -> None:
    cluster = {"num_workers": 1, "gpu": False, "cpus_per_worker": 0.5, "max_decoders": 1}
    stage = colour_stage(tmp_path, cluster=cluster)
    settings = settings_in(tmp_path, stage, baselines={})
    compare_on_ray(settings)
    assert {trial["trial"] for trial in summary_of(settings)["trials"]} == {"v1-seed0", "v3-seed0"}
    assert summary_of(settings)["accuracy"]["v1"]["all"] > 0.6
