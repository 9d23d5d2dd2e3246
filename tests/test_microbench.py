"""The microbenchmarks in ``benchmarks/``: that they run, and that a run is stored to be compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_calls_are_timed_and_stored(tmp_path):
    # An item that is measured on every kind of device.
    chosen = "latent and 128x20-float32- and not forward and not backward"
    options = ("-q", "-p", "no:cacheprovider", "-k", chosen, "--benchmark-max-time=0.01")
    store = ("--benchmark-autosave", f"--benchmark-storage={tmp_path}")
    command = [sys.executable, "-m", "pytest", "benchmarks", *options, *store]
    # Inside a worker of pytest-xdist pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.rglob("*.json")
    benchmarks = json.loads(path.read_text())["benchmarks"]
    assert benchmarks
    for benchmark in benchmarks:
        assert benchmark["name"].startswith("test_call[latent 128x20-float32-")
        assert benchmark["stats"]["rounds"] >= 5
