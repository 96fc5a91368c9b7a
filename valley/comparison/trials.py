"""From a search space to trials: every point of it, with every seed, as the settings of a whole training."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from valley.comparison.settings import CompareSettings, Range
from valley.config import assign, validate
from valley.errors import SettingsError
from valley.training.encoding import EncodeSettings
from valley.training.mlflow_tracker import tracking_uri
from valley.training.settings import RunSettings
from valley.training.two_stages import TwoStages

STAGES = ("pretrain", "finetune")
TRIALS_FOLDER = "trials"


@dataclass(frozen=True)
class Trial:
    """One training of the comparison.

    Attributes:
        name: of its folder.
        variant: what it is a trial of; trials of one variant differ in their seeds.
        point: the dotted settings that make the variant.
        seed: of everything random in it.
        baseline: whether it checks the questions and does not compete.
        stages: the training.
    """

    name: str
    variant: str
    point: Mapping[str, Any]
    seed: int
    baseline: bool
    stages: TwoStages

    @property
    def folder(self) -> Path:
        """Where all of it lies."""
        return Path(self.stages.output)

    @property
    def is_blind(self) -> bool:
        """Whether its model has never seen a frame."""
        return self.stages.finetune.data.blind


def list_trials(settings: CompareSettings) -> list[Trial]:
    """Returns all trials, seed by seed, so that a comparison that is cut short has all variants of the first seeds.

    Raises:
        SettingsError: the search space leads to settings that cannot be; with every problem.
    """
    points = list(_points(settings))
    variants = [(_label(point), point, False) for point in points]
    baselines = [(name, {**points[0], **changes}, True) for name, changes in settings.baselines.items()]
    wanted = [
        (variant, seed)
        for seed in settings.seeds
        for variant in (*variants, *(baselines if seed == settings.seeds[0] else []))
    ]
    trials, problems = [], list[str]()
    for (label, point, baseline), seed in wanted:
        try:
            name = f"{_folder_name(label)}-seed{seed}"
            trials.append(Trial(name, label, point, seed, baseline, _stages(settings, name, point, seed)))
        except SettingsError as error:
            problems += [f"search: {label}: {problem}" for problem in error.problems]
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)))
    names = [trial.name for trial in trials]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SettingsError([f"search: several trials would be called {', '.join(sorted(twice))}"])
    return trials


def _points(settings: CompareSettings) -> Iterator[dict[str, Any]]:
    """Every combination of the lists, with every draw from the ranges."""
    lists = {path: values for path, values in settings.search.items() if isinstance(values, list)}
    ranges = {path: values for path, values in settings.search.items() if isinstance(values, Range)}
    rng = np.random.default_rng(0)  # the first draws stay the same when more are asked for
    draws = [{path: _draw(rng, span) for path, span in ranges.items()} for _ in range(settings.draws if ranges else 1)]
    for drawn in draws:
        for values in itertools.product(*lists.values()):
            point = {**dict(zip(lists, values, strict=True)), **drawn}
            yield {path: point[path] for path in settings.search}


def _draw(rng: np.random.Generator, span: Range) -> float | int:
    if isinstance(span.low, int) and isinstance(span.high, int) and not span.log:
        return int(rng.integers(span.low, span.high, endpoint=True))
    if not span.log:
        return float(f"{rng.uniform(span.low, span.high):.4g}")
    value = math.exp(rng.uniform(math.log(span.low), math.log(span.high)))
    whole = isinstance(span.low, int) and isinstance(span.high, int)
    return round(value) if whole else float(f"{value:.4g}")


def _label(point: Mapping[str, Any]) -> str:
    """The values alone where they say enough, else with the last words of their paths."""
    if list(point) == ["model.temporal"]:
        return str(point["model.temporal"])
    return " ".join(f"{path.rpartition('.')[2]}={value}" for path, value in point.items())


def _folder_name(label: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", label).strip("-.")[:80] or "trial"


def _stages(settings: CompareSettings, name: str, point: Mapping[str, Any], seed: int) -> TwoStages:
    """The training of one trial.

    Raises:
        SettingsError: a path or a value that cannot be.
    """
    stages: dict[str, RunSettings] = {}
    for stage in STAGES:
        base: RunSettings | None = getattr(settings, stage)
        if base is None:
            continue
        tree = base.model_dump(mode="json")
        tree["seed"] = seed
        tree["tracking"] |= {"uri": comparison_uri(settings), "log_model": False}
        if place := base.checkpoint.path:
            tree["checkpoint"]["path"] = f"{place.rstrip('/')}/{name}/{stage}"
        for path, value in point.items():
            words = path.split(".")
            if words[0] in STAGES and getattr(settings, words[0]) is None:
                raise SettingsError([f"{path}: there is no {words[0]} in this comparison"])
            if words[0] in STAGES and words[0] != stage:
                continue
            own = words[1:] if words[0] == stage else words
            _refuse_without_effect(base, path, own, first=stage == "pretrain" or settings.pretrain is None)
            assign(tree, own, value)
        stages[stage] = validate(RunSettings, tree)
    training = TwoStages(output=str(Path(settings.output) / TRIALS_FOLDER / name), **stages)
    planned = training.planned
    stores = {
        stage: given.model_copy(update={"features": _store(settings, planned[stage])})
        for stage, given in stages.items()
    }
    return training.model_copy(update=stores)


def _refuse_without_effect(base: RunSettings, path: str, own: list[str], *, first: bool) -> None:
    """Refuses what a stage does not listen to: variants that differ in it alone would be one variant.

    Raises:
        SettingsError: it is a setting of a model that is loaded, or of a sampling that every source overrides.
    """
    loaded = base.model.path is not None if first else path.split(".")[0] in STAGES
    if own[0] == "model" and own[1:] not in (["path"], ["llm", "attention"]) and loaded:
        raise SettingsError([f"{path}: has no effect, for this stage begins with a saved model"])
    if own[:2] == ["data", "sampling"] and (named := [source.path for source in base.data.sources if source.sampling]):
        raise SettingsError([f"{path}: has no effect on data.sources with a sampling of their own: {', '.join(named)}"])


def comparison_uri(settings: CompareSettings) -> str:
    """Returns where MLflow keeps the comparison and all its trials."""
    return tracking_uri(settings.finetune.model_copy(update={"output": settings.output}))


def list_encodings(trials: Sequence[Trial], settings: CompareSettings) -> list[EncodeSettings]:
    """Returns the jobs that fill the stores which the trials read, each once."""
    jobs: dict[str, EncodeSettings] = {}
    for trial in trials:
        for stage in trial.stages.planned.values():
            if stage.features.startswith(_stores(settings)):
                tree = stage.model_dump(mode="json") | {"output": settings.output, "store": settings.store.model_dump()}
                job = validate(EncodeSettings, tree)
                data = job.data.model_dump_json(include={"sources", "validation", "sampling", "limits", "decoder"})
                jobs.setdefault(f"{job.features} {data}", job)
    return list(jobs.values())


def _store(settings: CompareSettings, stage: RunSettings) -> str:
    """The folder of the store that a stage reads: its own, or one for each tower."""
    if stage.data.blind or stage.features or not settings.share_features:
        return "" if stage.data.blind else stage.features
    vision = stage.model.vision
    tower = vision.model_dump_json(exclude={"micro_batch", "standardise"}) + (stage.model.path or "")
    key = hashlib.blake2b(tower.encode(), digest_size=4).hexdigest()
    return str(Path(_stores(settings)) / f"{_folder_name(vision.name)}-{key}")


def _stores(settings: CompareSettings) -> str:
    return settings.features or str(Path(settings.output) / "features")
