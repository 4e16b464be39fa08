"""To be removed: a line before anything slow is `support.console.info`."""

import contextlib

from support.console import info


@contextlib.contextmanager
def busy(text, disable=False, **_):
    """Say what is about to happen."""
    if not disable:
        info(f"{text} …")
    yield
