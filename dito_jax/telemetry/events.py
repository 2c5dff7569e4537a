"""Event log of a run over all its restarts: events.jsonl, and incidents.md as a summary."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from dito_jax.telemetry.run_directory import RunDirectory, explained, json_lines


RENAMED = {"place_lost": "worker_lost"}  # event names that earlier versions wrote: old -> new


class Events:
    """Appends events to events.jsonl; each event is on disk (fsync) before `record` returns."""

    def __init__(self, run: RunDirectory, *, process: int = 0, clock: Callable[[], float] = time.time):
        self._run, self._process, self._clock = run, process, clock

    def record(self, event: str, said: str | None = None, **values: Any) -> None:
        """Writes {"time": seconds since 1970, "process": 0, "event": "rollback", "said": "...", **values}.

        `said` is a sentence for the user, which is also printed on stderr.

        Raises:
          UserError: the disk is full.
        """
        row = {"time": self._clock(), "process": self._process, "event": event, "said": said} | values
        with explained(self._run.events):
            self._run.append(self._run.events, json.dumps(row) + "\n")
        if said is not None and self._run.writes:
            print(said, file=sys.stderr, flush=True)


def write_incidents(run: RunDirectory) -> None:
    """Writes incidents.md: the sentences of all events, with their times; nothing if no event has one."""
    rows = [row for row in read_events(run) if isinstance(row["said"], str) and row["said"]]
    if rows:
        when = lambda row: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row["time"]))
        lines = [f"- {when(row)} {row['said']}" for row in rows]
        run.write_text("incidents.md", f"# What happened to {run.path.name} (UTC)\n\n" + "\n".join(lines) + "\n")


def read_events(run: RunDirectory, *kinds: str, **fields: type) -> list[dict[str, Any]]:
    """All events in order, or only those of `kinds`; names of earlier versions are replaced by the current ones.

    Rows without `fields` of these types are left out.
    """
    rows = json_lines(run.events, event=str, time=float, **fields)
    rows = [{"said": None} | row | {"event": RENAMED.get(row["event"], row["event"])} for row in rows]
    return [row for row in rows if not kinds or row["event"] in kinds]
