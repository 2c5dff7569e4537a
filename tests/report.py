"""What a run of the tests says of its own time: the total against the budget, and slow tests without a reason."""

import resource
import time

import pytest


# What `make test` may take on two cores with nothing cached, and one test without a reason for more.
SUITE_SECONDS, TEST_CPU_SECONDS = 1_200, 20
WHOLE_SUITE = 1_500  # tests; fewer are a part that somebody chose


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Report:
    """The pytest plug-in, in the main process and in each worker."""

    def __init__(self):
        self.started, self.spent = time.monotonic(), 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        """Gives each report its CPU time, which another process on the machine changes little."""
        report = yield
        report.cpu_seconds, self.spent = cpu_seconds() - self.spent, cpu_seconds()
        return report

    def pytest_terminal_summary(self, terminalreporter):
        reports = [r for each in terminalreporter.stats.values() for r in each if hasattr(r, "cpu_seconds")]
        by_test: dict[str, float] = {}
        for report in reports:
            by_test[report.nodeid] = by_test.get(report.nodeid, 0) + report.cpu_seconds
        reasoned = {report.nodeid for report in reports if "slow" in report.keywords}
        for test, seconds in sorted(by_test.items(), key=lambda each: -each[1]):
            if seconds > TEST_CPU_SECONDS and test not in reasoned:
                terminalreporter.write_line(
                    f"{seconds:.0f} s of CPU time, not marked slow(reason): {test}", yellow=True
                )
        if len(by_test) > WHOLE_SUITE:
            total = time.monotonic() - self.started
            terminalreporter.write_line(f"{total:,.0f} s of the {SUITE_SECONDS:,} s that the suite may take")
