"""Standard streams that are closed, or whose reader goes away, end no command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[3]
PRINTS = """
import contextlib, os, sys
from pathlib import Path
from dito_jax.run.standard_streams import make_lenient
make_lenient()
kept = open(sys.argv[1], "w")
for number in range(3000):
    print("to stdout", number, "\\udcff")
    print("to stderr", number, "\\udcff", file=sys.stderr)
with contextlib.suppress(OSError):
    os.write(2, b"C code writes too\\n")
print(sys.stdout.isatty(), sys.stderr.isatty())
kept.write("the end")
"""
PRINT = [sys.executable, "-c", PRINTS]


def shell(redirected: str, kept: Path) -> subprocess.CompletedProcess:
    """Runs the program in a shell, with `redirected` behind its words."""
    words = ["bash", "-o", "pipefail", "-c", f'"$@" {redirected}', "bash", *PRINT, str(kept)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    "redirected",
    ["", "2>&-", "1>&-", "0<&- 1>&- 2>&-", "| head -n 2", "2>&1 | head -n 2", "2> >(head -n 1) | head -n 1",
     "2> /dev/full", "1>&- 2> /dev/full"],
)  # fmt: skip
def test_the_program_comes_to_its_end_and_its_files_are_its_own(redirected, tmp_path):
    done = shell(redirected, tmp_path / "kept")
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr[-500:]
    assert (tmp_path / "kept").read_text() == "the end"


def test_what_is_read_is_whole_and_a_name_that_is_not_utf_8_is_escaped(tmp_path):
    done = shell("", tmp_path / "kept")
    assert done.stdout.decode().splitlines()[:3000] == [f"to stdout {number} \\udcff" for number in range(3000)]
    assert done.stderr.decode().splitlines()[2999:] == ["to stderr 2999 \\udcff", "C code writes too"]


def test_a_result_that_cannot_be_written_is_an_error(tmp_path):
    done = shell("> /dev/full", tmp_path / "kept")
    assert done.returncode != 0 and b"No space left" in done.stderr


SUPERVISES = """
import sys
from dito_jax.resilience.supervisor import Supervisor
from dito_jax.resilience.workers import make_workers
from dito_jax.run import command_line
from dito_jax.telemetry.run_directory import RunDirectory

trainer = "import sys\\nfor step in range(3000): print('step', step, flush=True)\\nopen(sys.argv[1], 'w').write('end')"
command = [sys.executable, "-c", trainer, sys.argv[2]]
supervisor = Supervisor(command, RunDirectory(sys.argv[1]), make_workers(1, []), None)
command_line.run(lambda: None, lambda _: sys.exit(supervisor.supervise()), computes=lambda _: False)
"""


def test_what_reads_the_supervisor_goes_away_and_the_run_goes_on(tmp_path):
    reader, writer = os.pipe()
    words = [sys.executable, "-c", SUPERVISES, str(tmp_path / "run"), str(tmp_path / "kept")]
    supervisor = subprocess.Popen(words, cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    assert os.read(reader, 4)
    os.close(reader)
    assert supervisor.wait(timeout=60) == 0
    assert (tmp_path / "kept").read_text() == "end"
    assert (tmp_path / "run/supervise.log").read_text().splitlines()[-1].endswith("step 2999")
