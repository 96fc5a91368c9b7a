"""A comparison in MLflow: one run for all of it, a child for each trial, and the best model in the registry."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from valley.checkpoints.store import write_json
from valley.comparison.settings import CompareSettings, RegistrySettings
from valley.comparison.trials import Trial, comparison_uri
from valley.errors import TrackingError
from valley.evaluation.metrics import score
from valley.model.saved import MODEL_FOLDER
from valley.training.mlflow_tracker import MlflowRun, MlflowTracker, make_client, run_status, start_run
from valley.training.tracking import metric_name

RUN_FILE = "mlflow.json"
_FLUSH_S = 120.0


def begin_comparison_run(settings: CompareSettings, *, num_nodes: int = 1) -> MlflowRun | None:
    """Opens the run of a comparison, or goes on with the one that its folder names; None when tracking is off.

    Raises:
        TrackingError: MLflow cannot be used as configured.
    """
    stage, folder = settings.finetune, Path(settings.output)
    tracking = {"uri": comparison_uri(settings), "run_name": stage.tracking.run_name or folder.name}
    whole = stage.model_copy(update={"output": settings.output, "tracking": stage.tracking.model_copy(update=tracking)})
    run = start_run(whole, num_nodes=num_nodes, run_id=_known_run(folder))
    _remember(folder, run)
    return run


@dataclass(frozen=True)
class TrialRun:
    """The MLflow run of a trial; its stages are children of it.

    Attributes:
        mlflow: the run; None when tracking is off.
    """

    mlflow: MlflowRun | None

    def status(self, is_stopped: Callable[[], bool]) -> AbstractContextManager[None]:
        """Within: the trial. Ends the run as that ends; `is_stopped` tells whether it was to come to its end at all."""
        return run_status(self.mlflow, lambda: "KILLED" if is_stopped() else "FINISHED")

    def log(
        self, result: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], accuracy: Mapping[int, float]
    ) -> None:
        """Writes a trial's curve and its last figures, by names that compare well."""
        if self.mlflow is None:
            return
        tracker = MlflowTracker(self.mlflow, flush_s=_FLUSH_S)
        for step, share in accuracy.items():
            tracker.log_metrics(step, {"accuracy while training": share})
        kinds = score((row["kind"], row["right"], len(row["choices"])) for row in answers)
        last = {f"accuracy/{metric_name(kind.kind)}": kind.accuracy for kind in kinds}
        last["accuracy"] = sum(kind.num_right for kind in kinds) / sum(kind.num_questions for kind in kinds)
        cost = {"seconds": result["seconds"], "trainable parameters": result["trainable_parameters"]}
        tracker.log_metrics(result["steps"], last | cost)
        tracker.close()


def begin_trial_run(trial: Trial, parent: MlflowRun | None) -> TrialRun:
    """Opens the run of a trial below the comparison's, or goes on with the one that its folder names; notes what it is.

    Raises:
        TrackingError: MLflow cannot be used as configured.
    """
    if parent is None:
        return TrialRun(None)
    stage = trial.stages.finetune
    tracking = {"uri": parent.uri, "run_name": trial.name, "parent": parent.run_id}
    settings = stage.model_copy(update={"tracking": stage.tracking.model_copy(update=tracking)})
    run = start_run(settings, run_id=_known_run(trial.folder))
    _remember(trial.folder, run)
    if run:
        tracker = MlflowTracker(run, flush_s=_FLUSH_S)
        tracker.log_params({"variant": trial.variant, "seed": str(trial.seed)} | _as_text(trial.point))
        tracker.close()
    return TrialRun(run)


def log_report(run: MlflowRun | None, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
    """Puts the report into the comparison's run."""
    if run is None:
        return
    tracker = MlflowTracker(run, flush_s=_FLUSH_S)
    tracker.log_metrics(0, metrics)
    for file in files:
        tracker.log_artifact(file)
    tracker.close()


def register(registry: RegistrySettings, uri: str, result: Mapping[str, Any], settings_files: Sequence[Path]) -> str:
    """Enters a trial's model in the registry, unless it is there under the alias; returns what to ask for it by.

    Args:
        registry: name and alias.
        uri: of MLflow.
        result: the trial's; its run keeps the model from now on, and the settings that made it.
        settings_files: these, each in the folder of its stage.

    Raises:
        TrackingError: MLflow refused.
    """
    from mlflow.exceptions import MlflowException

    client, run_id = make_client(uri), result["mlflow_run_id"]
    try:
        if found := client.search_registered_models(f"name = '{registry.name}'"):
            version = found[0].aliases.get(registry.alias)
            if version and client.get_model_version(registry.name, version).run_id == run_id:
                return f"models:/{registry.name}@{registry.alias} (version {version})"
        else:
            client.create_registered_model(registry.name, description="Valley models that won a comparison.")
        client.log_artifacts(run_id, result["checkpoint"], MODEL_FOLDER)
        for file in settings_files:
            client.log_artifact(run_id, str(file), file.parent.name)
        made = client.create_model_version(
            registry.name,
            f"{client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}",
            run_id,
            tags={"variant": result["variant"], "seed": str(result["seed"])} | _as_text(result["point"]),
        )
        client.set_registered_model_alias(registry.name, registry.alias, made.version)
    except (MlflowException, OSError) as error:
        raise TrackingError(f"the best model could not be registered at {uri}: {error}") from error
    return f"models:/{registry.name}@{registry.alias} (version {made.version})"


def _as_text(point: Mapping[str, Any]) -> dict[str, str]:
    return {path: value if isinstance(value, str) else json.dumps(value) for path, value in point.items()}


def read_run(folder: Path) -> MlflowRun | None:
    """Returns the MLflow run of a comparison or a trial; None when it has none yet."""
    file = folder / RUN_FILE
    return MlflowRun(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _known_run(folder: Path) -> str | None:
    run = read_run(folder)
    return run.run_id if run else None


def _remember(folder: Path, run: MlflowRun | None) -> None:
    if run:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN_FILE, asdict(run))
