"""The microbenchmarks in ``benchmarks/``: that they run, and that a run is stored to be compared with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_calls_are_timed_and_stored(tmp_path):
    options = ("-q", "-p", "no:cacheprovider", "-k", "latent and 8x8 and float32", "--benchmark-max-time=0.01")
    store = ("--benchmark-autosave", f"--benchmark-storage={tmp_path}")
    command = [sys.executable, "-m", "pytest", "benchmarks", *options, *store]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.rglob("*.json")
    benchmarks = json.loads(path.read_text())["benchmarks"]
    assert benchmarks
    for benchmark in benchmarks:
        assert benchmark["name"].startswith("test_call[latent 8x8-float32-")
        assert benchmark["stats"]["rounds"] >= 5
