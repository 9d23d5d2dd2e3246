"""Builds the native backend's libraries: one for CPUs, one for CUDA, each for every Python and every torch from the target on.

    python csrc/build.py [--out DIR] [--only cpu|cuda] [--sanitize] [--strict] [--jobs N]

What this machine has no tools for is left out, with a line that says why. Only a compiler's error is a failure. A second call
compiles what has changed. Standard library only: torch's headers are found without importing torch.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

SOURCES = Path(__file__).resolve().parent
ROOT = SOURCES.parent
WORK = ROOT / "build"


def _read(name: str) -> ModuleType:
    """A module of the package, without the package, which would import torch."""
    spec = importlib.util.spec_from_file_location(f"_build_{name}", ROOT / "fused_elbo" / "backends" / "native" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


library, tools = _read("library"), _read("tools")

WARNINGS = ("-Wall", "-Wextra")
CXX_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", *WARNINGS)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")

# Files named kernels*.cpp are compiled once per instruction set; which one runs is decided on the user's processor.
INSTRUCTION_SETS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c",
               "-mprefer-vector-width=512"),
}  # fmt: skip

# The newest of them is added as PTX, for GPUs that are newer still.
GPUS = (80, 90, 100)


class NotBuilt(Exception):
    """One line: why this machine cannot build a library, and what it takes."""


class CompileError(Exception):
    """A compiler's command and its output."""


class Torch(NamedTuple):
    root: Path
    version: str

    @property
    def libraries(self) -> Path:
        return self.root / "lib"


class Unit(NamedTuple):
    """One compilation: a name for progress, the command without its output, and the object file."""

    name: str
    command: tuple[str, ...]
    object: Path

    @property
    def stamp(self) -> Path:
        """What the object was made from."""
        return self.object.with_suffix(".json")

    @property
    def dependencies(self) -> Path:
        return self.object.with_suffix(".d")


class Options(NamedTuple):
    """``strict``: a warning is an error. It is not by default, since the next compiler will have others."""

    sanitize: bool = False
    strict: bool = False
    jobs: int = os.cpu_count() or 1
    echo: Callable[[str], None] = print


class Recipe(NamedTuple):
    """Everything that makes one library: compilations, the linker's command before and after the objects, what to note."""

    units: list[Unit]
    link: tuple[str, ...]
    libraries: tuple[str, ...]
    facts: dict[str, Any]


def find_torch() -> Torch:
    """The torch whose headers are used. An isolated build does not see the environment's packages, but they lie on its disk."""
    spec = importlib.util.find_spec("torch")
    folders = [*(spec.submodule_search_locations or ())] if spec else []
    paths = sysconfig.get_paths()
    folders += [str(Path(parent, "torch")) for parent in (paths["purelib"], paths["platlib"], site.getusersitepackages())]
    roots = [Path(folder) for folder in folders if Path(folder, "version.py").is_file()]
    target = library.version(library.TORCH_TARGET)
    if not roots:
        raise NotBuilt(f"torch's headers are not here (looked in {', '.join(dict.fromkeys(folders))}): install torch>={target}")
    root = roots[0]
    version = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text())[1]
    if tuple(map(int, version.split(".")[:2])) < library.TORCH_TARGET:
        raise NotBuilt(f"the torch in {root} is {version}: the headers of {target} or newer are needed")
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        raise NotBuilt(f"the torch in {root} came without its headers: install one of its wheels")
    return Torch(root, version)


def cpu_recipe(torch: Torch, work: Path, options: Options) -> Recipe:
    cxx = tools.cxx()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = INSTRUCTION_SETS if x86 else {"portable": ()}
    optimised = ("-O1", *SANITIZERS) if options.sanitize else ("-O3",)
    flags = (*CXX_FLAGS, *optimised, *(("-Werror",) if options.strict else ()), *_torch_flags(torch))
    sources = sorted((SOURCES / "cpu").glob("*.cpp"))
    kernels = [source for source in sources if source.name.startswith("kernels")]
    x86_flag = ("-DFE_X86",) if x86 else ()
    units = [_unit((*cxx, *flags, *x86_flag), source, work) for source in sources if source not in kernels]
    # The least demanding first: of an inline function that several objects hold, the linker keeps the first.
    units += [_unit((*cxx, *flags, f"-DFE_ISA={name}", *more), source, work, name)
              for name, more in sets.items() for source in kernels]  # fmt: skip
    # The sanitizers' own symbols are the program's to bring.
    link = (*cxx, "-shared", *(SANITIZERS if options.sanitize else ("-Wl,--no-undefined",)))
    return Recipe(units, link, _linked(torch.libraries, "torch_cpu"), {"compiler": _named(cxx), "architectures": list(sets)})


def cuda_recipe(torch: Torch, work: Path, options: Options) -> Recipe:
    cxx = tools.cxx()
    nvcc = [*tools.nvcc(), "-ccbin", tools.host_compiler()]
    known = _output([*nvcc, "--list-gpu-arch"]).split()
    gpus = [gpu for gpu in GPUS if f"compute_{gpu}" in known]
    if not gpus:
        raise NotBuilt(f"{nvcc[0]} knows none of sm_{', sm_'.join(map(str, GPUS))}: install a newer CUDA toolkit")
    targets = [*((gpu, f"sm_{gpu}") for gpu in gpus), (gpus[-1], f"compute_{gpus[-1]}")]
    flags = ("-std=c++17", "-O3", "--threads", "2", "-Xfatbin=-compress-all",
             "-Xcompiler", ",".join(("-fPIC", "-fvisibility=hidden", *WARNINGS)),
             *(("-Xcompiler", "-Werror", "-Werror", "all-warnings") if options.strict else ()),
             "-DUSE_CUDA", *_torch_flags(torch),
             *(f"-gencode=arch=compute_{gpu},code={code}" for gpu, code in targets))  # fmt: skip
    units = [_unit((*nvcc, *flags), source, work) for source in sorted((SOURCES / "cuda").glob("*.cu"))]
    # A stand-in with the name that the loader will look for, also where the installed torch has no CUDA.
    stub = work / "libtorch_cuda.so"
    if not stub.exists():
        _call([*cxx, "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{stub.name}", "-o", str(stub)])
    release = re.search(r"release ([\d.]+), V([\d.]+)", _output([*nvcc, "--version"]))
    facts = {
        "compiler": f"nvcc {release[2]}, {_named(cxx)}",
        "cuda": release[1],
        "architectures": [code for _, code in targets],
    }
    return Recipe(units, (*nvcc, "-shared"), (*_linked(torch.libraries, "torch_cpu"), *_linked(work, "torch_cuda")), facts)


def build(device_type: str, out: Path, work: Path, options: Options) -> None:
    """One library and its manifest into ``out``; objects into ``work``.

    Raises:
        NotBuilt: this machine lacks what it takes.
        CompileError: a compiler found a mistake.
    """
    if platform.system() != "Linux":
        raise NotBuilt(f"the libraries are built on Linux, this is {platform.system()}")
    if options.sanitize and device_type != "cpu":
        raise NotBuilt("the sanitizers are for the CPU library")
    torch = find_torch()
    work = work / (device_type + "-sanitize" * options.sanitize)
    work.mkdir(parents=True, exist_ok=True)
    try:
        recipe = {"cpu": cpu_recipe, "cuda": cuda_recipe}[device_type](torch, work, options)
    except tools.MissingTool as error:
        raise NotBuilt(str(error)) from None
    if not recipe.units:
        raise NotBuilt(f"{SOURCES / device_type} holds no sources")
    facts = {
        "interface": library.interface(),
        "torch_target": library.version(library.TORCH_TARGET),
        "torch_headers": torch.version,
        **recipe.facts,
        "sanitize": options.sanitize,
    }
    path = out / library.LIBRARIES[device_type]
    with _alone(work, f"{device_type}: waiting for another build", options.echo):
        keys = _compile(device_type, recipe.units, json.dumps(facts), options)
        facts["key"] = _hash(*recipe.link, *recipe.libraries, json.dumps(facts), *keys)
        if library.problem(path) is None and library.read_manifest(path).get("key") == facts["key"]:
            options.echo(f"{device_type}: {path} is current")
            return
        fresh = work / path.name
        _call([*recipe.link, *(str(unit.object) for unit in recipe.units), *recipe.libraries, "-o", str(fresh)])
        out.mkdir(parents=True, exist_ok=True)
        # A program that has the old library mapped keeps its file.
        shutil.copyfile(fresh, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        library.manifest_of(path).write_text(json.dumps({**library.fingerprint(path), **facts}, indent=1) + "\n")
    options.echo(f"{device_type}: built {path} ({path.stat().st_size / 2**20:.1f} MiB; {', '.join(facts['architectures'])})")


def build_all(devices: Sequence[str], out: Path, work: Path, options: Options) -> int:
    """``build`` for several devices, its exceptions as lines.

    Returns:
        0, or 1 if a compiler found a mistake.
    """
    code = 0
    for device_type in devices:
        try:
            build(device_type, out, work, options)
        except NotBuilt as reason:
            options.echo(f"{device_type}: not built: {reason}")
        except CompileError as error:
            options.echo(f"{device_type}: failed:\n{error}")
            code = 1
    return code


def _compile(device_type: str, units: Sequence[Unit], environment: str, options: Options) -> list[str]:
    """Bring every object up to date. Returns a key for each, which changes with everything that went into it."""
    keys = {unit: _current(unit, environment) for unit in units}
    stale = [unit for unit in units if keys[unit] is None]

    def run(unit: Unit) -> tuple[float, str]:
        started = time.perf_counter()
        unit.stamp.unlink(missing_ok=True)
        printed = _call([*unit.command, "-MMD", "-MF", str(unit.dependencies), "-o", str(unit.object)])
        return time.perf_counter() - started, printed

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(run, unit): unit for unit in stale}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(running), 1):
                unit = running[future]
                seconds, warnings = future.result()
                # A rule of make, "object: sources", in which a blank in a path is escaped as for a shell.
                rule = unit.dependencies.read_text().replace("\\\n", " ")
                sources = sorted(set(shlex.split(rule.partition(":")[2])))
                keys[unit] = _key(unit, environment, sources)
                unit.stamp.write_text(json.dumps({"key": keys[unit], "sources": sources}))
                options.echo(f"{device_type}: [{done}/{len(stale)}] {unit.name}, {seconds:.1f} s")
                if warnings:
                    options.echo(warnings)
        except CompileError:
            pool.shutdown(cancel_futures=True)
            raise
    return [keys[unit] for unit in units]


def _current(unit: Unit, environment: str) -> str | None:
    """The key of an object that is what a compilation would make again, else None."""
    try:
        stamp = json.loads(unit.stamp.read_text())
        return stamp["key"] if unit.object.is_file() and stamp["key"] == _key(unit, environment, stamp["sources"]) else None
    except (OSError, ValueError):
        return None


def _key(unit: Unit, environment: str, sources: Sequence[str]) -> str:
    return _hash(*unit.command, environment, *(Path(source).read_bytes() for source in sources))


def _hash(*parts: str | bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return whole.hexdigest()[:16]


def _unit(command: Sequence[str], source: Path, work: Path, variant: str = "") -> Unit:
    name = f"{source.name} for {variant}" if variant else source.name
    return Unit(name, (*command, "-c", str(source)), work / f"{source.stem}{'-' * bool(variant)}{variant}.o")


def _torch_flags(torch: Torch) -> tuple[str, ...]:
    major, minor = library.TORCH_TARGET
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    return (target, "-isystem", str(torch.root / "include"), "-I", str(SOURCES))


def _linked(folder: Path, name: str) -> tuple[str, ...]:
    """Record a library as needed, used or not. Written so that g++ and nvcc both understand it."""
    return ("-Xlinker", "--no-as-needed", f"-L{folder}", "-Xlinker", f"-rpath-link={folder}", f"-l{name}")


@contextlib.contextmanager
def _alone(work: Path, waiting: str, echo: Callable[[str], None]) -> Iterator[None]:
    import fcntl  # which not every system has that reads this file

    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            echo(waiting)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _named(compiler: Sequence[str]) -> str:
    """Program and version."""
    return _output([*compiler, "--version"]).splitlines()[0]


def _output(command: Sequence[str]) -> str:
    try:
        return _call(command)
    except (OSError, CompileError) as error:
        raise NotBuilt(f"a tool does not work: {' '.join(str(error).split())}") from None


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the native backend's libraries.")
    parser.add_argument("--out", type=Path, help="folder for the libraries (default: the package's, or build/sanitize)")
    parser.add_argument("--only", choices=tuple(library.LIBRARIES), help="build one library (default: both)")
    parser.add_argument("--sanitize", action="store_true", help="the CPU library with AddressSanitizer and UBSan")
    parser.add_argument("--strict", action="store_true", help="a warning is an error")
    parser.add_argument("--jobs", type=int, default=Options().jobs, help="compilations at a time (default: one per processor)")
    asked = parser.parse_args(arguments)
    default = WORK / "sanitize" if asked.sanitize else library.FOLDER
    devices = [asked.only] if asked.only else ["cpu"] if asked.sanitize else list(library.LIBRARIES)
    options = Options(asked.sanitize, asked.strict, asked.jobs)
    return build_all(devices, (asked.out or default).absolute(), WORK / "objects", options)


if __name__ == "__main__":
    sys.exit(main())
