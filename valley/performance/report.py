"""Writing measurements into BENCHMARKS.md: one section a benchmark, with machine, date and command."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import psutil


def machine() -> str:
    """The machine in a line: processor, cores, memory, GPU if any, Python."""
    cpu_info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpu_info.read_text(), re.MULTILINE) if cpu_info.exists() else None
    cores, memory_gib = psutil.cpu_count() or 1, psutil.virtual_memory().total / 2**30
    processor = match[1].strip() if match else platform.processor() or platform.machine()
    return f"{processor}, {cores} cores, {memory_gib:.0f} GiB, {_gpu()}, Python {platform.python_version()}"


def versions(*packages: str) -> str:
    """Versions of those of `packages` that are installed, in a line."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are right-aligned."""
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write_section(file: Path, title: str, command: str, body: str) -> None:
    """Replaces the section `## title` of a Markdown file, or appends it, headed by command, machine and date."""
    head = f"`{command}` · {datetime.datetime.now(datetime.UTC).date().isoformat()} · {machine()}"
    section = f"## {title}\n\n{head}\n\n{body.strip()}\n"
    text = file.read_text() if file.exists() else "# Benchmarks\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(text):
        text = pattern.sub(lambda _: section + "\n", text)
    else:
        text = f"{text.rstrip()}\n\n{section}"
    file.write_text(text.rstrip() + "\n")


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
