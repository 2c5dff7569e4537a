"""Shared code of the commands bench, tune, inspect and build: argument parsing, one-line errors and exit codes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..op import Op


INTERRUPTED = 130  # the exit code of a process that Ctrl-C has ended, as shells count it


def run(command: str, main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of `main`; Ctrl-C is one line on stderr and exit code 130."""
    try:
        code = main()
    except KeyboardInterrupt:
        print(f"{_program(command)}: interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _program(command: str) -> str:
    return f"python -m kernels_pallas.{command}"


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error as one line on stderr and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser(command: str, description: str | None) -> Parser:
    """A parser for `python -m kernels_pallas.<command> [op ...] [--case NAME]`."""
    result = Parser(prog=_program(command), description=description)
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    result.add_argument("ops", nargs="*", metavar="op", help="names of operations, e.g. flash_attention (default: all)")
    result.add_argument("--case", metavar="NAME", help="run only the case with this name")
    return result


def choose_ops(parser: Parser, args: argparse.Namespace, ops: Sequence[Op]) -> list[Op]:
    """The operations that the command line names. An unknown op or case ends the command with exit code 2."""
    known = {op.name: op for op in ops}
    if unknown := [name for name in args.ops if name not in known]:
        parser.error(f"no op named {unknown[0]!r}; choose from {', '.join(known)}.")
    chosen = [known[name] for name in args.ops or known]
    cases = {name: None for op in chosen for name in op.cases}
    if args.case is not None and args.case not in cases:
        parser.error(f"no case named {args.case!r}; choose from {', '.join(cases)}.")
    return chosen


def one_line(error: Exception) -> str:
    """The class of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition('\n')[0]}"
