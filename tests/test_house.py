"""How the package is put together: which way imports run, and what ``import fused_elbo`` needs."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import fused_elbo

PACKAGE = Path(fused_elbo.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400

# Who may import whom of the core, in full; a package, and a backend, also its own files.
CORE = {
    "": {
        *("nn", "distributions", "diagnostics", "functional", "iwae", "linear"),
        *("schedules", "autograd", "ops", "_version"),
    },
    "_version": set(),
    "nn": {"functional", "linear", "options", "arguments"},
    "integrations": {"distributions", "functional", "sampling", "remembered"},
    "distributions": {"functional", "remembered", "arguments"},
    "remembered": set(),
    "iwae": {"objective", "diagnostics", "options", "sampling", "arguments"},
    "linear": {"linear_operator", "objective", "routes", "diagnostics", "options", "autograd", "ops", "arguments", "spec"},
    "linear_operator": {"operators", "autograd", "ops", "spec"},
    "functional": {"objective", "plain", "routes", "sampling", "options", "diagnostics", "arguments"},
    "diagnostics": {"arguments"},
    "objective": {"plain", "groups", "routes", "sampling", "options", "autograd", "ops", "reference", "arguments", "spec"},
    "plain": {"operators", "reference", "routes", "sampling", "autograd", "ops", "arguments", "spec"},
    "routes": {"operators", "sharding", "autograd", "ops", "spec"},
    "sharding": {"operators", "autograd"},
    "groups": set(),
    "operators": {"sampling", "autograd", "ops", "backends", "reference", "spec"},
    "options": {"arguments", "spec"},
    "sampling": {"arguments"},
    "schedules": {"arguments"},
    "arguments": set(),
    "autograd": {"reference", "spec"},
    # Backends are loaded by name, when they are asked for.
    "ops": set(),
    "reference": {"spec"},
    "spec": set(),
    "backends": {"reference", "spec"},
}

# Tools and examples over the public names, which the core may not know.
ABOVE = {"cli", "__main__", "vae", "check", "cases", "accuracy", "doctor", "bench", "codegen"}

KERNELS = [path for path in (PACKAGE / "backends").rglob("*.py") if "@triton.jit" in path.read_text()]


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports anywhere, as paths below the package."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            name = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + name
            elif name[:1] == ("fused_elbo",):
                base = name[1:]
            else:
                continue
            for alias in node.names:
                below = PACKAGE.joinpath(*base, alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").exists()
                found.add((*base, alias.name) if is_module else base)
        elif isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "fused_elbo"}
    return found


def test_imports_run_downward():
    found: dict[str, set[str]] = {}
    for path in FILES:
        module = module_of(path)
        own = module[0] if module else ""
        if own in ABOVE:
            continue
        used = found.setdefault(own, set())
        for target in imports_of(path):
            if (own == "backends" and target[:2] == module[:2]) or own == target[0] in ("reference", "autograd"):
                continue
            used.add(target[0] if target else "")
    assert found == CORE
    # Raises where it runs in a circle.
    graphlib.TopologicalSorter(CORE).prepare()


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_kernels_import_nothing_of_ours(path):
    directory = module_of(path)[:-1]
    assert all(target[: len(directory)] == directory for target in imports_of(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_typed():
    assert (PACKAGE / "py.typed").exists()


def test_public_names():
    assert fused_elbo.__all__ == sorted(fused_elbo.__all__)
    for name in fused_elbo.__all__:
        assert hasattr(fused_elbo, name)


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_import_needs_little():
    run("""
import sys
sys.modules["triton"] = None
sys.modules["matplotlib"] = None
import torch
for name in ("is_available", "device_count", "get_device_properties", "get_device_capability", "_lazy_init"):
    def queried(*_, name=name, **__):
        raise AssertionError(f"torch.cuda.{name} was called at import")
    setattr(torch.cuda, name, queried)
import fused_elbo as fe
""")


def test_import_loads_little():
    run("""
import sys
import torch
before = set(sys.modules)
import fused_elbo
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"triton", "matplotlib", "scipy", "mlxtend", "tqdm"}, loaded
assert not torch.cuda.is_initialized()
""")


def test_without_triton_the_rest_runs_and_the_reason_is_kept():
    run("""
import sys
sys.modules["triton"] = None
import fused_elbo as fe
import torch
t = torch.zeros(2, 3, requires_grad=True)
fe.elbo_loss(t, t + 1, t, t).loss.backward()
assert "triton" in fe.ops.unavailable("triton", "cpu")
try:
    with fe.backend("triton"):
        fe.kl_divergence(t, t)
except RuntimeError as error:
    assert "import failed" in str(error) and "triton" in str(error), error
else:
    raise AssertionError("a backend that was asked for fell back")
""")
