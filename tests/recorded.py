"""Tests that need not run again: they passed with the code on which they depend, and that code has not changed.

A test marked `recorded` is a pure function of code of this repository and of installed packages: no clocks, processes
or compilers outside Python. tests/recorded.json maps each group of such tests, usually a file, to the digest of all
that the group depends on (dependencies.py).

    pytest --skip-recorded   leaves out each group whose digest is current; `make test`
    pytest --record          writes the digests of the groups of which every test ran and passed; `make test-all`

While it records, it notes which files of the repository the tests execute. A group that executes a file that its digest
does not cover is not recorded, and the run fails.
"""

import contextlib
import functools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dependencies import ROOT, closure, digest


PATH = ROOT / "tests" / "recorded.json"
CODE = {".py", ".cc", ".cu", ".h"}
# They choose tests and report on them, and change no result.
RUNNER = {ROOT / "tests" / name for name in ("recorded.py", "dependencies.py", "report.py")}
OURS = {"dito_jax", "kernels_pallas", "configs", "tests", "train.py"}
MONITOR = 4  # one of the identifiers of sys.monitoring that no debugger, profiler or coverage tool takes


def add_options(parser) -> None:
    parser.addoption("--skip-recorded", action="store_true", help="leave out tests recorded as passed with this code")
    parser.addoption("--record", action="store_true", help="write tests/recorded.json from the tests that pass")


def group(item) -> str | None:
    """The name of the group of a test: its file, and the arguments of the mark; None if it is not recorded."""
    mark = item.get_closest_marker("recorded")
    if mark is None or item.get_closest_marker("gpu"):
        return None
    return " ".join((str(item.path.relative_to(ROOT)), *mark.args))


@functools.cache
def files(name: str) -> set[Path]:
    """All files on which a group depends: its own, the conftest.py files above it, and all that they import.

    The arguments of the mark are further files and folders. Where there are any, the operations of kernels_pallas on
    which the group depends are those in these folders, not all that `kernels_pallas.OPS` lists.
    """
    file, *more = (ROOT / part for part in name.split())
    above = [folder / "conftest.py" for folder in file.parents if ROOT in (folder, *folder.parents)]
    roots = [file, *(conftest for conftest in above if conftest.is_file())]
    for path in more:
        roots += [f for f in path.rglob("*") if f.suffix in CODE] if path.is_dir() else [path]
    return {file for file in closure(roots, registry=not more) if file not in RUNNER}


@functools.cache
def current(name: str) -> str:
    return digest(files(name))


def read() -> dict[str, dict]:
    return json.loads(PATH.read_text()) if PATH.exists() else {}


@contextlib.contextmanager
def executed_files(seen: set[str]) -> Iterator[None]:
    """Adds to `seen` the paths, relative to the repository, of Python files whose functions are called meanwhile."""

    def called(code, _offset):
        path = code.co_filename.removeprefix(f"{ROOT}/")
        if path.partition("/")[0] in OURS and code.co_name != "<module>":
            seen.add(path)
        return sys.monitoring.DISABLE  # each function once

    sys.monitoring.use_tool_id(MONITOR, "recorded tests")
    sys.monitoring.register_callback(MONITOR, sys.monitoring.events.PY_START, called)
    sys.monitoring.restart_events()
    sys.monitoring.set_events(MONITOR, sys.monitoring.events.PY_START)
    try:
        yield
    finally:
        sys.monitoring.set_events(MONITOR, sys.monitoring.events.NO_EVENTS)
        sys.monitoring.register_callback(MONITOR, sys.monitoring.events.PY_START, None)
        sys.monitoring.free_tool_id(MONITOR)


class Recorded:
    """The pytest plug-in, in the main process and in each worker."""

    def __init__(self, config):
        self.config, self.records = config, read()
        self.sizes: dict[str, int] = {}
        self.digests: dict[str, str] = {}  # of the code that is imported, not of what it may be changed to meanwhile
        self.outcomes: dict[str, dict[str, str]] = {}
        self.problems: dict[str, str] = {}
        self.left_out = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        self.sizes = Counter(name for item in items if (name := group(item)))
        if config.option.skip_recorded or config.option.record:
            self.digests = {name: current(name) for name in self.sizes}
        if config.option.skip_recorded:
            out = [item for item in items if self.proven(item)]
            config.hook.pytest_deselected(items=out)
            items[:] = [item for item in items if item not in set(out)]
            self.left_out = len(out)

    def proven(self, item) -> bool:
        record = self.records.get(group(item) or "")
        return (
            record is not None
            and record["digest"] == self.digests[group(item)]
            and item.nodeid not in record["skipped"]
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        item.executed_files = set()
        if not self.config.option.record or group(item) is None:
            return (yield)
        with executed_files(item.executed_files):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        if name := group(item):
            covered = {str(file.relative_to(ROOT)) for file in files(name) | RUNNER}
            uncovered = sorted(item.executed_files - covered)
            report.recorded = name, self.sizes[name], self.digests.get(name), uncovered
        return report

    def pytest_runtest_logreport(self, report):
        """In the main process, of each phase of each test."""
        if not self.config.option.record or not hasattr(report, "recorded"):
            return
        name, self.sizes[name], self.digests[name], uncovered = report.recorded
        if uncovered:
            self.problems[name] = f"{report.nodeid} executes {', '.join(uncovered)}, which the digest does not cover"
        outcomes = self.outcomes.setdefault(name, {})
        if outcomes.get(report.nodeid, "passed") == "passed":
            outcomes[report.nodeid] = "failed" if uncovered else report.outcome

    def write(self) -> None:
        """Adds the groups that passed whole to the records, and drops those of files that are gone."""
        for name, outcomes in self.outcomes.items():
            if len(outcomes) == self.sizes[name] and "failed" not in outcomes.values():
                skipped = sorted(test for test, outcome in outcomes.items() if outcome == "skipped")
                passed = len(outcomes) - len(skipped)
                self.records[name] = {"digest": self.digests[name], "passed": passed, "skipped": skipped}
        kept = {name: record for name, record in self.records.items() if (ROOT / name.split()[0]).is_file()}
        lines = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in sorted(kept.items())]
        PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["left_out"] = self.left_out
        elif self.config.option.record:
            self.write()
            if self.problems:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """With pytest-xdist, in the main process: every worker leaves out the same tests."""
        self.left_out = getattr(node, "workeroutput", {}).get("left_out", self.left_out)

    def pytest_terminal_summary(self, terminalreporter):
        if self.left_out:
            line = f"{self.left_out:,} tests left out: they passed with this code (tests/recorded.json). "
            terminalreporter.write_line(line + "`make test-all` runs them.")
        for problem in self.problems.values():
            terminalreporter.write_line(f"not recorded: {problem}", red=True)
