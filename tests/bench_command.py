"""The benchmark's command as its tests run it: quick, on one thread, on items of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

from fused_elbo import cli, ops
from fused_elbo.bench import command, cpu_clock
from fused_elbo.bench.items import Item

OPTIONS = ("bench", "--device", "cpu", "--quick", "--threads", "1")


def run(folder: Path, *more: str, compiled: bool = False) -> tuple[int, dict[str, Any]]:
    """Run the command; its exit code and the record that it has written."""
    path = folder / "times.json"
    with mock.patch.object(cpu_clock.CpuClock, "copy_bytes", 2**16):
        code = cli.main([*OPTIONS, *([] if compiled else ["--no-compile"]), "--json", str(path), *more])
    return code, json.loads(path.read_text())


def measured(monkeypatch, *chosen: Item) -> None:
    """Let the command measure these items."""
    monkeypatch.setattr(command, "items", lambda kind, **_: iter(chosen))


def only_reference(monkeypatch) -> None:
    monkeypatch.setattr(ops, "BACKENDS", {"reference": ops.BACKENDS["reference"]})
