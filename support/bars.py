"""Progress bars: tqdm's, with a clock that goes on and a forecast without the slow start."""

import contextlib
import os
import threading
import weakref
from pathlib import Path

from tqdm import tqdm

# A format for bars whose text has a speed of its own: with counts and times it fits 80 columns.
WITHOUT_RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

TICK = 2  # seconds without a change after which a bar is drawn again


class Bar(tqdm):
    """tqdm's bar, with two differences.

    The first item is not part of the speed: it waits for workers to start and for kernels to be
    chosen, and a forecast from it would be hours off. And the bar shows how time goes on while
    nothing comes.
    """

    measured_from = None  # (time, count), when the first items were there

    def __init__(self, *args, **options):
        self.closed = threading.Event()
        super().__init__(*args, **options)
        if not self.disable:
            # The thread has no reference: an abandoned bar is closed when it is collected.
            arguments = weakref.ref(self), self.closed
            threading.Thread(target=keep_ticking, args=arguments, daemon=True).start()

    @property
    def format_dict(self):
        """tqdm's values for a line, with the speed since the first items."""
        values = super().format_dict
        if not self.disable:
            now = self._time()
            if self.measured_from is None and self.n > self.initial:
                self.measured_from = now, self.n
            start, count = self.measured_from or (now, self.n)
            # 0 is shown as "?", as is the time left.
            values["rate"] = (self.n - count) / (now - start) if self.n > count else 0
        return values

    def close(self):
        self.closed.set()
        super().close()


def keep_ticking(reference, closed):
    """Draw a bar anew where nothing else did for a while, until it is closed."""
    while not closed.wait(TICK):
        bar = reference()
        if bar is None:
            return
        if bar._time() - bar.last_print_t >= TICK:
            bar.last_print_t = bar._time()
            with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more
                bar.refresh()
        del bar


def busy(text, **options):
    """A context manager: while its block runs, stderr shows `text` and for how long already."""
    options |= {"bar_format": "{desc} … {elapsed}", "leave": False, "dynamic_ncols": True}
    return Bar(desc=text, **options)


def reading_progress(lines, path):
    """Yield what `read_lines` yields, with a bar if the file takes longer than half a second."""
    size = os.path.getsize(path) if os.path.isfile(path) else None
    options = {"unit": "B", "unit_scale": True, "delay": 0.5, "leave": False, "dynamic_ncols": True}
    with Bar(total=size, desc=f"reading {Path(path).name}", **options) as bar:
        for number, offset, raw in lines:
            if number % 1000 == 0:
                bar.update(offset - bar.n)
            yield number, offset, raw
