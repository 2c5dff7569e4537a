"""Progress display: a tqdm bar on a terminal, plain lines otherwise."""

import sys
from collections.abc import Mapping

from tqdm import tqdm


class Progress:
    """Shows the step and a few metrics on stderr, out of `total` steps, from `step` on."""

    def __init__(self, total: int, *, step: int = 0):
        self._total = total
        self._bar = tqdm(total=total, initial=step, unit="step") if sys.stderr.isatty() else None

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the step and the values; called once per log interval."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is None:
            print(f"step {step}/{self._total}  {text}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Closes the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.close()
