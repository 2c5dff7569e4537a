"""Exit codes of the commands, and the exceptions that map to them."""

DONE = 0
CRASHED = 1  # an unexpected exception: a bug here or in a dependency; see the traceback
USER_MISTAKE = 2  # usage error, explained in one line; the same command will fail again
PREEMPTED = 75  # stopped by a signal after saving; the same command resumes
HUNG = 86  # watchdog timeout; the same command resumes from the last checkpoint
INTERRUPTED = 130  # Ctrl-C before or outside training


class UserError(ValueError):
    """A usage error in one line: what was given, what was wanted, what to do; a command prints it and exits with 2."""


class Preempted(KeyboardInterrupt):
    """The run was stopped by a signal and has saved its state; a command exits with 75.

    No Exception, since `except Exception` of any library in which it is raised would take it for an error of its own;
    a KeyboardInterrupt, since asyncio lets that pass, too.
    """
