"""``csrc/build.py`` and what pip makes of it, on a copy of the tree with sources that compile in no time."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fused_elbo.backends.native import library, tools

ROOT = Path(__file__).parents[1]
SOURCE = '#include "value.h"\nextern "C" int value() { return VALUE; }\n'
KERNELS = """
#define NAMED(prefix, name) prefix##name
#define FUNCTION(name) NAMED(kernel_, name)
extern "C" int FUNCTION(FE_ISA)() { return 1; }
"""


def refused(function) -> str | None:
    try:
        function()
    except tools.MissingTool as error:
        return str(error)


needs_cxx = pytest.mark.skipif(refused(tools.cxx) is not None, reason=str(refused(tools.cxx)))


@pytest.fixture
def tree(tmp_path) -> Path:
    """The repository with two tiny sources in place of the kernels, and a blank in its path."""
    root = tmp_path / "a tree"
    (root / "csrc" / "cpu").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    shutil.copy(ROOT / "csrc" / "build.py", root / "csrc")
    shutil.copytree(ROOT / "fused_elbo", root / "fused_elbo", ignore=shutil.ignore_patterns("__pycache__", "lib"))
    (root / "tests").mkdir()
    (root / "tests" / "oracle.py").touch()
    (root / "csrc" / "cpu" / "value.cpp").write_text(SOURCE)
    (root / "csrc" / "cpu" / "kernels.cpp").write_text(KERNELS)
    (root / "csrc" / "value.h").write_text("#define VALUE 1\n")
    return root


@pytest.fixture
def builder(tree):
    """The copy's build.py as a module."""
    spec = importlib.util.spec_from_file_location("builder_of_a_test", tree / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, cwd=tree, capture_output=True, text=True, check=False
    )


def build(tree: Path, *arguments: str, **environment: str) -> str:
    done = run(tree, "csrc/build.py", "--only", "cpu", *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiled(printed: str) -> list[str]:
    return sorted(re.findall(r"\[\d+/\d+\] (.*), [\d.]+ s", printed))


@needs_cxx
def test_builds_what_has_changed_and_nothing_else(tree):
    path = tree / "fused_elbo" / "lib" / library.LIBRARIES["cpu"]
    first = compiled(build(tree))
    manifest = library.read_manifest(path)
    assert first == sorted(["value.cpp", *(f"kernels.cpp for {name}" for name in manifest["architectures"])])
    assert library.problem(path) is None
    assert manifest["interface"] == library.interface()

    before = path.stat().st_mtime_ns
    (tree / "csrc" / "value.h").touch()
    assert "is current" in build(tree)
    assert path.stat().st_mtime_ns == before

    (tree / "csrc" / "value.h").write_text("#define VALUE 2\n")
    assert compiled(build(tree)) == ["value.cpp"]
    assert library.read_manifest(path)["key"] != manifest["key"]

    path.write_bytes(path.read_bytes()[:1000])
    printed = build(tree)
    assert compiled(printed) == []
    assert library.problem(path) is None

    assert compiled(build(tree, "--out", str(tree / "elsewhere"))) == []
    assert library.problem(tree / "elsewhere" / path.name) is None


@needs_cxx
def test_finds_torch_from_an_isolated_build(tree):
    # Such a build has the environment's prefix, but not its packages.
    program = (
        "import runpy, sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; sys.argv = ['', '--only', 'cpu'];"
    )
    done = run(tree, "-c", program + "runpy.run_path('csrc/build.py', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    assert "built" in done.stdout


@needs_cxx
def test_a_compile_error_is_a_failure_and_shows(tree):
    (tree / "csrc" / "cpu" / "value.cpp").write_text("int value() { return undeclared; }\n")
    done = run(tree, "csrc/build.py", "--only", "cpu")
    assert done.returncode == 1
    assert "undeclared" in done.stdout
    assert not list((tree / "fused_elbo").glob("lib/*.so"))


@needs_cxx
def test_a_warning_is_shown_and_with_strict_an_error(tree):
    (tree / "csrc" / "cpu" / "value.cpp").write_text("int value(int unused) { return 1; }\n")
    assert "unused" in build(tree)
    assert run(tree, "csrc/build.py", "--only", "cpu", "--strict").returncode == 1


@needs_cxx
def test_an_undefined_symbol_is_found_by_the_linker(tree):
    (tree / "csrc" / "cpu" / "value.cpp").write_text("int nowhere(); int value() { return nowhere(); }\n")
    done = run(tree, "csrc/build.py", "--only", "cpu")
    assert done.returncode == 1
    assert "nowhere" in done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": "", "CXX": ""}, "no C++ compiler here (looked for g++, clang++, c++): install one, or set CXX"),
        ({"CXX": "/nonexistent/g++"}, "CXX=/nonexistent/g++ is not a program here"),
    ],
)
def test_without_a_compiler(tree, environment, message):
    printed = build(tree, **environment)
    assert printed.startswith("cpu: not built: ")
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_with_a_compiler_that_does_not_work(tree):
    broken = tree / "broken"
    broken.write_text("#!/bin/sh\necho no licence >&2\nexit 3\n")
    broken.chmod(0o755)
    printed = build(tree, CXX=f"'{broken}'")
    assert printed.startswith("cpu: not built: a tool does not work: ")
    assert printed.endswith("no licence\n")


@needs_cxx
def test_without_a_cuda_compiler(tree):
    done = run(tree, "csrc/build.py", "--only", "cuda", NVCC="/nonexistent/nvcc")
    assert done.returncode == 0
    assert (
        done.stdout
        == "cuda: not built: NVCC=/nonexistent/nvcc is not a program here: install it, or set NVCC to a CUDA compiler\n"
    )


def test_without_torch(builder, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "site"
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(builder.sysconfig, "get_paths", lambda: {"purelib": str(folder), "platlib": str(folder)})
    monkeypatch.setattr(builder.site, "getusersitepackages", lambda: str(folder))
    for version, message in (
        (None, "torch's headers are not here"),
        ("2.9.1+cpu", "is 2.9.1+cpu"),
        ("2.10.0", "without its headers"),
    ):
        if version is not None:
            (folder / "torch").mkdir(parents=True, exist_ok=True)
            (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
        assert builder.main(["--only", "cpu"]) == 0
        printed = capsys.readouterr().out
        assert message in printed
        assert len(printed.splitlines()) == 1


def make(tree: Path, kind: str, **environment: str) -> tuple[subprocess.CompletedProcess, str]:
    """Calls the hook that pip calls. Returns also the name of the file in ``dist``."""
    done = run(tree, "-c", f"from setuptools import build_meta; print('\\n' + build_meta.build_{kind}('dist'))", **environment)
    return done, done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""


@pytest.fixture
def hooks():
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools older than pyproject.toml asks for")


@needs_cxx
def test_wheels(tree, hooks):
    """One with a library is of a platform and any Python; one without is of any platform, also after one with it."""
    done, name = make(tree, "wheel", FUSED_ELBO_BUILD="cpu")
    assert re.fullmatch(r"fused_elbo-[\d.]+-py3-none-linux_\w+\.whl", name), done.stdout + done.stderr
    held = zipfile.ZipFile(tree / "dist" / name).namelist()
    path = f"fused_elbo/lib/{library.LIBRARIES['cpu']}"
    assert path in held
    assert str(library.manifest_of(Path(path))) in held
    assert not (tree / "fused_elbo" / "lib").exists()

    build(tree)
    done, name = make(tree, "wheel", FUSED_ELBO_BUILD="0")
    assert name.endswith("-py3-none-any.whl"), done.stdout + done.stderr
    assert not [held for held in zipfile.ZipFile(tree / "dist" / name).namelist() if "/lib/" in held]


@needs_cxx
def test_an_editable_installation_builds_in_place(tree, hooks):
    done, name = make(tree, "editable", FUSED_ELBO_BUILD="cpu")
    assert name.endswith("-py3-none-any.whl"), done.stdout + done.stderr
    assert library.problem(tree / "fused_elbo" / "lib" / library.LIBRARIES["cpu"]) is None


@needs_cxx
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_compile_error_stops_pip(tree, hooks, kind):
    (tree / "csrc" / "cpu" / "value.cpp").write_text("int value() { return undeclared; }\n")
    done, _ = make(tree, kind, FUSED_ELBO_BUILD="cpu")
    assert done.returncode != 0
    assert "undeclared" in done.stdout
    assert "FUSED_ELBO_BUILD=0 installs without" in done.stderr


def test_without_a_compiler_pip_goes_on(tree, hooks):
    done, name = make(tree, "wheel", CXX="/nonexistent/g++")
    assert name.endswith("-py3-none-any.whl"), done.stdout + done.stderr
    assert "cpu: not built: CXX=/nonexistent/g++ is not a program here" in done.stdout


def test_the_source_distribution_has_the_sources(tree, hooks):
    done, name = make(tree, "sdist")
    assert name.endswith(".tar.gz"), done.stderr
    with tarfile.open(tree / "dist" / name) as archive:
        held = {str(Path(*Path(member).parts[1:])) for member in archive.getnames()}
    assert {"setup.py", "csrc/build.py", "csrc/value.h", "csrc/cpu/kernels.cpp", "tests/oracle.py", "Makefile"} <= held


@pytest.mark.parametrize("words", ["g++", "ccache g++", "g++ -m64 -isystem folder", "ccache g++ -m64"])
def test_nvcc_is_given_the_compiler_alone(monkeypatch, words):
    monkeypatch.setenv("CXX", words)
    monkeypatch.setattr(tools.shutil, "which", lambda name: name)
    assert tools.host_compiler() == "g++"
