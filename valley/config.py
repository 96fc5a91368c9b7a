"""Settings: frozen pydantic models, filled from a YAML file and dotted overrides.

A run is `--config preset-or-file.yaml a.b=value …`. A YAML file may name another under `extends`; its own keys win.
Every wrong key and value is reported at once, each with its dotted path and the choices there are.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from valley.errors import SettingsError

PRESETS = Path(__file__).parent / "presets"


class Settings(BaseModel):
    """Base of every settings model: frozen, and an unknown key is an error.

    Attributes:
        presets: folder of the YAML files that `--config` takes by name.
    """

    presets: ClassVar[Path] = PRESETS

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


S = TypeVar("S", bound=Settings)


def _absolute(path: str) -> str:
    if not path or "://" in path or Path(path).expanduser().is_absolute():
        return str(Path(path).expanduser()) if path.startswith("~") else path
    home = os.environ.get("VALLEY_HOME")
    if home is None and _in_submitted_job():
        raise ValueError(
            "relative path, but a submitted job runs in a scratch directory whose files are lost: "
            "give an absolute path, or set VALLEY_HOME where the cluster is started"
        )
    return str(Path(home or Path.cwd()) / path)


def _in_submitted_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


Location = Annotated[str, AfterValidator(_absolute)]
"""A path or fsspec URI; a relative path is taken from `$VALLEY_HOME`, else from the working directory."""


def _absolute_if_there(name: str) -> str:
    path = Path(os.environ.get("VALLEY_HOME") or Path.cwd()) / Path(name).expanduser()
    return str(path) if path.exists() else name


Weights = Annotated[str, AfterValidator(_absolute_if_there)]
"""A name on a hub, or a path, which is taken as `Location` takes it when something is there."""


def preset_names(model: type[Settings] = Settings) -> list[str]:
    """Names that `--config` takes for a settings class, besides a file's path."""
    return sorted(path.stem for path in model.presets.glob("*.yaml"))


def load_settings(model: type[S], config: str | None, overrides: Sequence[str] = ()) -> S:
    """Builds settings from a preset or YAML file and `a.b=value` overrides; later ones win.

    Args:
        model: the settings class to fill.
        config: a preset's name or a path to a YAML file; None means defaults.
        overrides: words of the form `dotted.path=value`, the value in YAML. A value that was split at its spaces by
            the shell (`[{path: a.json, root: b}]` without quotes) is joined again.

    Raises:
        SettingsError: with every problem found, each on its own line.
    """
    tree = read_config(config, model) if config else {}
    problems: list[str] = []
    for word in _join_split_values(overrides):
        try:
            assign(tree, *_parse_override(word))
        except SettingsError as error:
            problems += error.problems
    try:
        settings = validate(model, tree)
    except SettingsError as error:
        problems += error.problems
    if problems:
        raise SettingsError(problems)
    return settings


def validate(model: type[S], tree: Mapping[str, Any]) -> S:
    """Makes settings of a plain tree.

    Raises:
        SettingsError: with every problem found, each on its own line.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_explain(model, error.errors())) from None


def read_config(name_or_path: str, model: type[Settings] = Settings) -> dict[str, Any]:
    """Reads a preset or YAML file into a plain tree, with what it `extends` beneath it; parts may extend, too.

    Args:
        name_or_path: a preset of `model`, or a file.
        model: the settings class that it is for.

    Raises:
        SettingsError: no such preset or file, not a mapping, or not YAML.
    """
    path = _find_config(name_or_path, model)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError([f"--config {name_or_path}: not YAML: {error}"]) from None
    if not isinstance(tree, dict):
        raise SettingsError([f"--config {name_or_path}: expected a mapping of settings, found {type(tree).__name__}"])
    tree = {key: _extended(value, Settings) if isinstance(value, dict) else value for key, value in tree.items()}
    return _extended(tree, model)


def _extended(tree: dict[str, Any], model: type[Settings]) -> dict[str, Any]:
    """The tree on top of the preset or file that its `extends` names."""
    above = {key: value for key, value in tree.items() if key != "extends"}
    return _merge(read_config(tree["extends"], model), above) if "extends" in tree else above


def describe(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields (dotted path, type, default, description) for every setting below `model`, in order."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        nested = _nested_model(field.annotation)
        if nested is not None and typing.get_origin(field.annotation) is None:
            yield from describe(nested, f"{path}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else _show(default)
        yield path, _type_name(field.annotation), shown, " ".join((field.description or "").split())
        if nested is not None:
            yield from describe(nested, f"{path}.N." if typing.get_origin(field.annotation) is list else f"{path}.")


def _find_config(name_or_path: str, model: type[Settings]) -> Path:
    if (preset := model.presets / f"{name_or_path}.yaml").is_file():
        return preset
    if (path := Path(name_or_path)).is_file():
        return path
    raise SettingsError([f"--config {name_or_path}: no such file; presets are {', '.join(preset_names(model))}"])


def _join_split_values(words: Sequence[str]) -> list[str]:
    joined: list[str] = []
    depth = 0
    for word in words:
        if depth > 0:
            joined[-1] += f" {word}"
        else:
            joined.append(word)
        if depth > 0 or word.partition("=")[2].startswith(("[", "{")):
            depth += sum(word.count(mark) for mark in "[{") - sum(word.count(mark) for mark in "]}")
    return joined


def _parse_override(word: str) -> tuple[list[str], Any]:
    path, equals, text = word.partition("=")
    if not equals or not path:
        raise SettingsError([f"{word}: expected dotted.path=value"])
    try:
        return path.split("."), yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise SettingsError([f"{path}: value is not YAML: {text}"]) from None


def assign(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Sets what a dotted path leads to in a plain tree of settings, and makes the mappings on the way.

    Raises:
        SettingsError: the path leads into a single value, or to no item of a list.
    """
    node: Any = tree
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise SettingsError([f"{'.'.join(path)}: {key} is not an index of a list of {len(node)}"])
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
            if not last and not isinstance(node.get(key), dict | list):
                node[key] = {}
        else:
            raise SettingsError([f"{'.'.join(path)}: {'.'.join(path[:depth])} holds a single value"])
        if last:
            node[index] = value
        else:
            node = node[index]


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _explain(model: type[BaseModel], details: Sequence[ErrorDetails]) -> list[str]:
    """One line a setting; where it may be one of several things, what each of them asks for."""
    reasons: dict[str, list[str]] = {}
    for detail in details:
        location = [str(part) for part in detail["loc"] if not _KIND.search(str(part))]
        reasons.setdefault(".".join(location), []).append(_reason(model, location, detail))
    return [f"{path}: {' or '.join(some)}".removeprefix(": ") for path, some in reasons.items()]


_KIND = re.compile(r"\[|-|^(int|float|str|bool|list|tuple|dict)$")
"""In what pydantic puts into a location for the kinds that a value may be of, and no setting has in its name."""


def _reason(model: type[BaseModel], location: Sequence[str], detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        known = list(owner.model_fields) if owner else []
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"unknown setting; {hint}known here: {', '.join(known)}"
    if detail["type"] == "missing":
        return "required"
    reason = detail["msg"].removeprefix("Value error, ")
    found = "" if isinstance(detail["input"], dict | BaseModel) else f", found {detail['input']!r}"
    return f"{reason[0].lower()}{reason[1:]}{found}"


def _model_at(model: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for part in location:
        if current is None:
            return None
        if part.isdigit():
            continue
        field = current.model_fields.get(part)
        current = _nested_model(field.annotation) if field else None
    return current


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in typing.get_args(annotation) if (found := _nested_model(arg))), None)


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(arg) for arg in args)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(arg) for arg in args)}]"
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation))


def _show(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, list | tuple | dict | bool) or value is None:
        return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip().replace("\n", " ")
    return str(value)
