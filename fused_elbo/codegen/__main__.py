"""``python -m fused_elbo.codegen``: every kernel's machine code beside its budget."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..backends.native import library
from . import OVER_BUDGET, UNREADABLE, budgets, native_kernels, report, sass
from .hardware import GPUS


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or what an option asks for.

    Args:
        argv: the arguments. Default None: those of the process.

    Returns:
        The exit code: 0, 1 if a kernel is over its budget or has none, 3 if nothing could be read.
    """
    parser = argparse.ArgumentParser(prog="python -m fused_elbo.codegen", description=__doc__)
    parser.add_argument("--only", choices=tuple(COMPILERS), help="one compiler's kernels (default: both)")
    parser.add_argument("--gpu", type=int, choices=tuple(GPUS), help="what is compiled for this one (default: for all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there too, as JSON")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--lines", action="store_true", help="print the rows as lines of JSON instead")
    instead.add_argument("--propose", action="store_true", help="print the budgets that today's code would get instead")
    instead.add_argument("--variants", action="store_true", help="compile rarer Triton launches instead, as lines of JSON")
    args = parser.parse_args(argv)
    if args.variants:
        return _variants()
    table = not (args.lines or args.propose)
    rows, records, missing = [], [], {}
    for line in (*_floors(), report.header()) if table else ():
        print(line)
    for compiler in [args.only] if args.only else COMPILERS:
        try:
            version, found = COMPILERS[compiler](GPUS if args.gpu is None else (args.gpu,))
        except sass.Unreadable as error:
            missing[compiler] = str(error)
            print(f"{compiler}: not run: {error}", file=sys.stdout if table else sys.stderr)
            continue
        for row in found:
            rows.append(row)
            if not args.propose:
                records.append(row.record(version))
                print(report.line(records[-1]) if table else json.dumps(records[-1]), flush=True)
    over = sum(bool(record["over"]) for record in records)
    if args.json:
        args.json.write_text(json.dumps({"rows": records, "not run": missing}, indent=1) + "\n")
    if args.propose:
        print("\n".join(budgets.proposal(rows)))
    elif table:
        print(f"{len(records)} read, {over} over budget")
    if not rows:
        return UNREADABLE
    return OVER_BUDGET if over else 0


def _floors() -> Iterator[str]:
    for architecture, gpu in GPUS.items():
        fit = " and ".join(f"{gpu.floor(count):.0f} beside {count} bytes" for count in (12, 6))
        yield f"sm_{architecture}, {gpu.name}: of an element's instructions {fit} take no longer than the bytes"


def _triton(gpus: Iterable[int]) -> tuple[str, Iterator[report.Row]]:
    tools = sass.Tools()
    try:
        import triton
    except ImportError as error:
        raise sass.Unreadable(f"import failed: {error}") from error
    from . import triton_kernels

    each = itertools.product(triton_kernels.DTYPES, gpus)
    rows = (triton_kernels.inspect(dtype, architecture, tools) for dtype, architecture in each)
    return triton.__version__, itertools.chain.from_iterable(rows)


def _nvcc(gpus: Iterable[int]) -> tuple[str, Iterator[report.Row]]:
    tools, path = sass.Tools(), library.location("cuda")
    if not path.exists():
        raise sass.Unreadable(f"there is no {path}: make build makes it where there is nvcc")
    problem = library.problem(path)
    if problem is not None:
        raise sass.Unreadable(problem)
    return native_kernels.compiler(path), (row for row in native_kernels.inspect(path, tools) if row.architecture in gpus)


COMPILERS = {"triton": _triton, "nvcc": _nvcc}


def _variants() -> int:
    from . import triton_kernels

    tools = sass.Tools()
    for dtype in triton_kernels.VARIANT_DTYPES:
        for name, launch in triton_kernels.variants(dtype).items():
            with triton_kernels.compiled(launch, triton_kernels.VARIANT_ARCHITECTURE) as (path, _):
                ((_, local),) = tools.usage(path).values()
            record = {"variant": name, "dtype": str(dtype).removeprefix("torch."), "local": local}
            print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
