"""What pyproject.toml cannot say: the package is built with the native backend's libraries, where the machine has the tools.

FUSED_ELBO_BUILD=0 leaves them out, FUSED_ELBO_BUILD=cpu or =cuda builds one. Missing tools are no failure: the package runs
without, and says so. A compiler's error is one, since pip hides what a build that succeeds has printed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
VARIABLE = "FUSED_ELBO_BUILD"

spec = importlib.util.spec_from_file_location("builder", ROOT / "csrc" / "build.py")
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)
LIBRARIES = builder.library.LIBRARIES


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012

    def run(self) -> None:
        # What an earlier build left there would be packed too.
        shutil.rmtree(Path(self.build_lib, "fused_elbo"), ignore_errors=True)
        super().run()


class BuildNative(Command):
    """Builds the libraries, for an editable installation in place."""

    def initialize_options(self) -> None:
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))
        folder = builder.library.FOLDER
        self.out = folder if self.editable_mode else Path(self.build_lib, folder.relative_to(ROOT))

    def run(self) -> None:
        asked = os.environ.get(VARIABLE) or "1"
        choices = {"0": (), "1": tuple(LIBRARIES), **{name: (name,) for name in LIBRARIES}}
        if asked not in choices:
            raise BaseError(f"{VARIABLE}: got {asked!r}, takes one of {', '.join(choices)}")
        if builder.build_all(choices[asked], self.out.absolute(), builder.WORK / "objects", builder.Options()):
            raise BaseError(f"a library does not compile (see above); {VARIABLE}=0 installs without, =cpu with that alone")

    def get_outputs(self) -> list[str]:
        return [] if self.editable_mode else [str(path) for path in self.out.glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in builder.SOURCES.rglob("*.*") if "__pycache__" not in path.parts]


class Wheel(bdist_wheel):
    """A library is of one platform, and of every Python: it knows torch alone."""

    def run(self) -> None:
        # Only then it is known whether there is a library.
        self.run_command("build")
        platform_specific = bool(self.get_finalized_command("build_native").get_outputs())
        self.root_is_pure = not platform_specific
        self.distribution.has_ext_modules = lambda: platform_specific
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel})
