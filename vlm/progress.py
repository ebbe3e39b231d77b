"""Progress on the terminal: what is running, how far it is and how long it still takes.

On a terminal one line is redrawn; in a log a line is printed every ten seconds.
"""

import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    return (
        f"{seconds // 60} min {seconds % 60} s" if seconds < 3600 else f"{seconds // 3600} h {seconds % 3600 // 60} min"
    )


class Progress:
    """One task of ``total`` units. ``update(done, loss=...)`` as often as you like.

    quiet: print nothing (ranks other than the first).
    """

    def __init__(self, title: str, total: int, quiet: bool = False, start: int = 0, out: TextIO | None = None) -> None:
        self.title, self.total, self.quiet, self.start = title, total, quiet, start
        self.out = out or sys.stderr
        self.begun = time.perf_counter()
        self.shown = 0.0
        self.redraw = self.out.isatty()

    def update(self, done: int, **values: float) -> None:
        now = time.perf_counter()
        finished = done >= self.total
        if self.quiet or (not finished and now - self.shown < (0.2 if self.redraw else 10.0)):
            return
        self.shown = now
        print(self.line(done, values), end="\n" if finished or not self.redraw else "", file=self.out, flush=True)

    def line(self, done: int, values: dict[str, float]) -> str:
        """The line for ``done`` units."""
        spent = time.perf_counter() - self.begun
        new = done - self.start
        left = f"{duration(spent / new * (self.total - done))} left" if new and done < self.total else duration(spent)
        numbers = "".join(f"  {name} {value:.3f}" for name, value in values.items())
        text = f"{self.title}  {done}/{self.total} ({100 * done // max(1, self.total)} %)  {left}{numbers}"
        return f"\r\x1b[2K{text}" if self.redraw else text
