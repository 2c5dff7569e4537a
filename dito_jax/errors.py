"""How a command ends: exit codes, and the errors that mean one."""

DONE = 0
CRASHED = 1  # a bug of ours, or of what we stand on; the traceback says which
USER_MISTAKE = 2  # one line said why; the same command will fail again
PREEMPTED = 75  # asked to stop, and saved; the same command goes on
HUNG = 86  # the watchdog saw no progress; the same command goes on from the last checkpoint
INTERRUPTED = 130


class UserError(ValueError):
    """What was given, what was wanted, what to do, in one line; a command prints it and exits with 2."""


class Preempted(Exception):
    """The run was asked to stop and has saved what there was to save; a command exits with 75."""
