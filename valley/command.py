"""The command line every job shares: `--config`, `key=value`, `--help`, `--dry-run`, and errors that help."""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from valley.config import Settings, describe, load_settings, preset_names
from valley.errors import SettingsError, ValleyError

S = TypeVar("S", bound=Settings)


class Command(NamedTuple, Generic[S]):
    """What the user asked for."""

    settings: S
    dry_run: bool


def parse_command(
    model: type[S], description: str, argv: Sequence[str] | None = None, *, switches: Mapping[str, str] | None = None
) -> Command[S]:
    """Reads a job's command line into settings.

    Args:
        model: the settings class of the job.
        description: what the job does, for `--help`.
        argv: words of the command line; None: `sys.argv`.
        switches: names of settings that may also be switched on by an option (`--resume`), with what that does.

    Raises:
        SettingsError: with every wrong key and value, each with its dotted path.
    """
    options = "".join(f"[--{name}] " for name in switches or {})
    parser = argparse.ArgumentParser(
        description=description,
        usage=f"%(prog)s [--config NAME_OR_FILE] [--dry-run] {options}[key=value …]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_settings_table(model),
    )
    presets = f"a preset ({', '.join(names)}) or " if (names := preset_names(model)) else ""
    parser.add_argument("--config", help=f"{presets}a YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, from metadata alone, and stop")
    for name, text in (switches or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    arguments, words = parser.parse_known_args(argv)
    words += [f"{name}=true" for name in switches or {} if getattr(arguments, name)]
    if wrong := [word for word in words if word.startswith("--")]:
        words = [word for word in words if word not in wrong]
        problems = [f"{word}: unknown option; settings are given as key=value{_meant(word)}" for word in wrong]
        try:
            load_settings(model, arguments.config, words)
        except SettingsError as error:
            problems += error.problems
        raise SettingsError(problems)
    return Command(load_settings(model, arguments.config, words), arguments.dry_run)


def run_command(job: Callable[[], None]) -> int:
    """Runs a job and turns Valley's own errors into a message on stderr and exit code 2; Ctrl-C gives 130."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    try:
        job()
    except SettingsError as error:
        print(f"{len(error.problems)} wrong setting(s):", *error.problems, sep="\n  ", file=sys.stderr)  # noqa: T201
        return 2
    except ValleyError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _meant(word: str) -> str:
    return f": did you mean {word.lstrip('-')}?" if "=" in word else ""


def _settings_table(model: type[Settings]) -> str:
    lines = ["settings (dotted path = default), all of them legal as key=value and in YAML:"]
    section = ""
    for path, kind, default, text in describe(model):
        if (head := path.partition(".")[0]) != section:
            section = head
            lines.append("")
        lines.append(f"  {path} = {default}")
        lines += textwrap.wrap(f"{kind}. {text}".strip(), 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
