"""A comparison from beginning to end, but for how its trials are carried out (`valley.distributed.compare`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from valley.checkpoints import store
from valley.checkpoints.store import write_json
from valley.comparison.report import PAGE, TEXT, conclusion, make_tables, write_report
from valley.comparison.results import ALL, Results
from valley.comparison.settings import CompareSettings
from valley.comparison.tracking import RUN_FILE, begin_comparison_run, log_report, register
from valley.comparison.trial import is_finished, is_stopped, read_result
from valley.comparison.trials import TRIALS_FOLDER, Trial, list_encodings, list_trials
from valley.data.writing import write_text
from valley.errors import ComparisonError, SettingsError
from valley.evaluation.questions import read_questions
from valley.training.encoding import plan_encoding
from valley.training.job import SETTINGS_FILE
from valley.training.mlflow_tracker import MlflowRun, ui_command
from valley.training.summary import SUMMARY_FILE
from valley.training.tracking import metric_name

logger = logging.getLogger(__name__)

_DECIDING = ("pretrain", "finetune", "evaluation", "baselines", "shuffled")
"""Settings that must be the same for a comparison to go on; seeds and points may be added."""
_INDIFFERENT = ("cluster", "checkpoint", "tracking", "profile", "output", "features")
"""Of a stage, what does not change what comes of it."""


def plan_comparison(settings: CompareSettings) -> str:
    """Returns what a comparison is going to do, from metadata alone.

    Raises:
        ValleyError: settings, data or model cannot be used.
    """
    trials = list_trials(settings)
    questions, rejects = read_questions(settings.evaluation.questions, settings.evaluation.max_questions)
    lines = [f"{len(trials)} trials, {settings.concurrent} at a time, in {settings.output}"]
    lines += [f"  {trial.name}{' (checks the questions)' if trial.baseline else ''}" for trial in trials]
    lines += [f"{len(questions)} questions to each when it is trained, {len(rejects)} unreadable"]
    lines += [f"features, once: {job.features}: {plan_encoding(job)}" for job in list_encodings(trials, settings)]
    return "\n".join(lines)


def open_comparison(
    settings: CompareSettings, trials: Sequence[Trial], *, num_nodes: int = 1
) -> tuple[list[Trial], MlflowRun | None]:
    """Makes the folder, or goes on with it, and opens the MLflow run.

    Returns:
        The trials that are still to be run, and the MLflow run.

    Raises:
        SettingsError: the folder holds an unfinished comparison that `resume` was not asked for, or another one.
        TrackingError: MLflow cannot be used as configured.
    """
    folder = Path(settings.output)
    earlier = folder / SETTINGS_FILE
    if settings.resume and earlier.exists():
        _refuse_other(settings, trials, earlier)
    elif earlier.exists():
        if not (folder / SUMMARY_FILE).exists():
            raise SettingsError(
                [f"output: {folder} holds an unfinished comparison: go on with --resume, or choose another output"]
            )
        for name in (TRIALS_FOLDER, TEXT, PAGE, SUMMARY_FILE, RUN_FILE):
            _clear(folder / name)
    (folder / SUMMARY_FILE).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(earlier, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    run = begin_comparison_run(settings, num_nodes=num_nodes)
    done = [trial.name for trial in trials if is_finished(trial)]
    if done:
        logger.info("%d of %d trials are finished: %s", len(done), len(trials), ", ".join(done))
    waiting = [trial for trial in trials if not (is_finished(trial) or is_stopped(trial))]
    # Stopped and finished ones take part in the milestones of those that are still running.
    return (list(trials) if waiting and settings.stopping else waiting), run


def _clear(path: Path) -> None:
    if path.is_dir():
        if aside := store.set_aside(path):
            logger.warning("what an earlier comparison made was moved to %s", aside)
    else:
        path.unlink(missing_ok=True)


def _refuse_other(settings: CompareSettings, trials: Sequence[Trial], earlier: Path) -> None:
    before, now = yaml.safe_load(earlier.read_text(encoding="utf-8")), settings.model_dump(mode="json")
    differences = [
        f"{name}: not as it was when this comparison began"
        for name in _DECIDING
        if _what_decides(before.get(name)) != _what_decides(now[name])
    ]
    differences += [
        f"search: {trial.name} was run with {result['point']}, and is now to be one of {dict(trial.point)}"
        for trial in trials
        if is_finished(trial) and (result := read_result(trial))["point"] != json.loads(json.dumps(dict(trial.point)))
    ]
    if differences:
        raise SettingsError([f"output: {earlier.parent} holds another comparison", *differences])


def _what_decides(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {key: value for key, value in part.items() if key not in _INDIFFERENT}


def conclude(
    settings: CompareSettings, trials: Sequence[Trial], run: MlflowRun | None, failures: Sequence[str] = ()
) -> str:
    """Writes the report and the summary, puts them into MLflow, registers the best model; returns what there is to say.

    Raises:
        ComparisonError: trials failed; the report is there when any variant was finished.
        TrackingError: the best model could not be registered.
    """
    folder, results = Path(settings.output), Results(trials)
    if not results.variants:
        raise ComparisonError("no trial of any variant was finished", failures)
    stopped = [trial for trial in results.unfinished if is_stopped(trial)]
    files = write_report(results, folder, title=f"Comparison {folder.name}", stopped=stopped)
    shares = {
        variant: {kind: cell.accuracy.mean for kind in (ALL, *results.kinds) if (cell := results.cell(variant, kind))}
        for variant in (*results.variants, *results.baselines)
    }
    metrics = {f"accuracy/{metric_name(name)}": kinds[ALL] for name, kinds in shares.items()}
    log_report(run, metrics, [*files, folder / SETTINGS_FILE])
    if failures:
        raise ComparisonError(f"there is a report of the others, {folder / PAGE}", failures)
    best, said = results.best(), conclusion(results)
    registered = None
    if settings.registry and run:
        whole = folder / TRIALS_FOLDER / best["trial"]
        registered = register(settings.registry, run.uri, best, sorted(whole.glob(f"*/{SETTINGS_FILE}")))
    summary = {
        "conclusion": said,
        "accuracy": shares,
        "trials": results.results,
        "stopped": [trial.name for trial in stopped],
        "best": best["trial"],
        "best_checkpoint": best["checkpoint"],
        "registered": registered,
        "report": str(folder / PAGE),
        "mlflow_run_id": run.run_id if run else None,
        "mlflow_ui": ui_command(run.uri) if run else None,
    }
    write_json(folder / SUMMARY_FILE, summary)
    log_report(run, {}, [folder / SUMMARY_FILE])
    lines = {
        "best": f"{best['trial']}: {best['checkpoint']}",
        "registry": registered or "not registered",
        "report": str(folder / PAGE),
        "MLflow": summary["mlflow_ui"] or "not tracked",
    }
    tables = "\n\n".join(table.markdown() for table in make_tables(results))
    return f"{tables}\n\n{said}\n\n" + "\n".join(f"{name:<10}{text}" for name, text in lines.items())
