"""What happened to a run, in words and in order: events.jsonl, over all its starts."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from dito_jax.telemetry.run_directory import RunDirectory, explained, json_lines


class Events:
    """Appends to events.jsonl; each event is on the disk before `record` returns, so that no kill can take it back."""

    def __init__(self, run: RunDirectory, *, process: int = 0, clock: Callable[[], float] = time.time):
        self._run, self._process, self._clock = run, process, clock

    def record(self, event: str, said: str | None = None, **values: Any) -> None:
        """{"time": seconds since 1970, "process": 0, "event": "rollback", "said": "...", **values}.

        `said` is for people: one sentence, printed on stderr as well.
        """
        row = {"time": self._clock(), "process": self._process, "event": event, "said": said} | values
        with explained(self._run.events):
            self._run.append(self._run.events, json.dumps(row) + "\n")
        if said is not None and self._run.writes:
            print(said, file=sys.stderr, flush=True)


def write_incidents(run: RunDirectory) -> None:
    """incidents.md: all that was said, for a person; nothing where there was nothing to say."""
    told = [row for row in read_events(run) if row["said"]]
    if told:
        when = lambda row: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row["time"]))
        lines = [f"- {when(row)} {row['said']}" for row in told]
        run.write_text("incidents.md", f"# What happened to {run.path.name} (UTC)\n\n" + "\n".join(lines) + "\n")


def read_events(run: RunDirectory, *kinds: str) -> list[dict[str, Any]]:
    """Every event, in order; only those of these kinds if any are named."""
    return [row for row in json_lines(run.events) if not kinds or row["event"] in kinds]
