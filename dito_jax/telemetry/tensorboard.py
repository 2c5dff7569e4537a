"""TensorBoard's event files, written in the caller's thread.

tensorboardX's SummaryWriter writes from a thread of its own. A full disk kills that thread, and the run then
waits for ever to hand it the next event; and a killed run loses the two minutes of events that it holds back.
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
    """Events of steps from `first` on; what older files in the directory say of those steps is hidden.

    Every method raises UserError if the disk is full.
    """

    def __init__(self, directory: Path, *, first: int):
        # `first` keeps apart the files of two starts within one second.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{first}"
        self._path = directory / name
        with explained(self._path):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(self._path))
        self._write(first, file_version="brain.Event:2")
        self._write(first, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point on each curve."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=Summary(value=points))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """One picture under `name`."""
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
