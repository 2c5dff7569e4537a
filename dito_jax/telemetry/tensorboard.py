"""TensorBoard event files, written in the calling thread.

tensorboardX's SummaryWriter writes from its own thread. A full disk kills that thread, and the run then blocks for ever
on the queue of events. A killed run also loses up to two minutes of buffered events.
"""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter

from dito_jax.telemetry.run_directory import explained


class TensorBoard:
    """Writes events of the steps from `first` on; older files' events of those steps are hidden (SessionLog.START).

    Every method raises UserError if the disk is full.
    """

    def __init__(self, directory: Path, *, first: int):
        # `first` makes the names of two starts within one second different.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{first}"
        self._path = directory / name
        with explained(self._path):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(self._path))
        self._write(first, file_version="brain.Event:2")
        self._write(first, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one scalar for each value."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=Summary(value=points))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Writes one image under `name`."""
        self._write(step, summary=summary.image(name, image, dataformats="HWC"))

    def close(self) -> None:
        """Closes the file."""
        with explained(self._path):
            self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        with explained(self._path):
            self._file.write(event.SerializeToString())
            self._file.flush()
