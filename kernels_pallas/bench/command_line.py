"""What the package's commands share: choosing ops and cases by name, and refusing in one line."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ..op import Op


class Parser(argparse.ArgumentParser):
    """An argument parser whose every refusal is one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser(command: str, description: str | None) -> Parser:
    """A parser for `python -m kernels_pallas.<command> [op ...] [--case NAME]`."""
    result = Parser(prog=f"python -m kernels_pallas.{command}", description=description)
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    result.add_argument("ops", nargs="*", metavar="op", help="names of ops; all of them by default")
    result.add_argument("--case", metavar="NAME", help="only the case of this name")
    return result


def choose_ops(parser: Parser, args: argparse.Namespace, ops: Sequence[Op]) -> list[Op]:
    """Those of `ops` that the command line names. An unknown op or case ends the command with exit code 2."""
    known = {op.name: op for op in ops}
    if unknown := [name for name in args.ops if name not in known]:
        parser.error(f"no op named {unknown[0]!r}; choose from {', '.join(known)}.")
    chosen = [known[name] for name in args.ops or known]
    cases = {name: None for op in chosen for name in op.cases}
    if args.case is not None and args.case not in cases:
        parser.error(f"no case named {args.case!r}; choose from {', '.join(cases)}.")
    return chosen


def one_line(error: Exception) -> str:
    """The class of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).partition('\n')[0]}"
