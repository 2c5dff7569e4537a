"""The account of a run's time, as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dito_jax.evaluation.plots import write_figure
from dito_jax.training.goodput import KINDS, Span, totals


COLOURS = dict(zip(KINDS, ("#9e9e9e", "#7e57c2", "#42a5f5", "#43a047", "#26c6da", "#ffb300", "#8d6e63", "#e53935",
                           "#eeeeee"), strict=True))  # fmt: skip


def table(spans: Sequence[Span]) -> str:
    """Seconds and share of each kind, how often the run began, and its goodput."""
    seconds, wall = totals(spans), spans[-1].end - spans[0].start
    lines = [f"{'':8}{'seconds':>12}{'share':>9}"]
    lines += [f"{kind:8}{seconds[kind]:12.1f}{seconds[kind] / wall:9.1%}" for kind in KINDS]
    starts = len({span.attempt for span in spans})
    return "\n".join([
        *lines,
        f"{'wall':8}{wall:12.1f}",
        f"goodput {seconds['step'] / wall:.1%} over {starts} start{'s' if starts > 1 else ''}",
    ])  # fmt: skip


def _merged(spans: Sequence[Span], most: int) -> list[Span]:
    """The same time in about that many spans; spans of two starts are not merged."""
    merged: list[Span] = []
    for index, span in enumerate(spans):
        if index % -(-len(spans) // most) and merged[-1].attempt == span.attempt:
            both = {kind: merged[-1].seconds.get(kind, 0.0) + span.seconds.get(kind, 0.0) for kind in KINDS}
            merged[-1] = Span(span.attempt, merged[-1].start, span.end, both)
        else:
            merged.append(span)
    return merged


def timeline(spans: Sequence[Span], path: Path) -> None:
    """A bar for each start of the run, along the wall clock, coloured by what the time went to.

    Within one stretch between two flushes the kinds are drawn one after the other: their shares are exact.
    """
    attempts = sorted({span.attempt for span in spans})
    figure = Figure(figsize=(10, 1.5 + 0.4 * len(attempts)), layout="constrained")
    axes = figure.add_subplot()
    for span in _merged(spans, most=500):
        left = span.start - spans[0].start
        for kind in KINDS:
            width = span.seconds.get(kind, 0.0)
            if width > 0:
                axes.barh(span.attempt, width, left=left, height=0.8, color=COLOURS[kind])
                left += width
    axes.set_yticks(attempts, [f"start {attempt}" for attempt in attempts])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(
        handles=[Patch(color=COLOURS[kind], label=kind) for kind in KINDS],
        ncols=len(KINDS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize="small",
    )  # fmt: skip
    write_figure(figure, path)
