"""What every command shares at the screen: argument types, progress, and errors for people."""

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
from pathlib import Path

from tqdm import tqdm

from evaluate import ArgumentParser as OneLineParser
from evaluate import UserError, shown

# A format for bars whose text has a speed of its own: with counts and times it fits 80 columns.
WITHOUT_RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """`--help` with the description as it is written and the defaults shown."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(OneLineParser):
    """Shows defaults in --help; names a tool by the command that starts it."""

    def __init__(self, **kwargs):
        module = getattr(sys.modules["__main__"].__spec__, "name", "")  # of python -m tools.NAME
        if module.startswith("tools."):
            kwargs.setdefault("prog", f"python -m {module}")
        super().__init__(formatter_class=HelpFormatter, **kwargs)


def number(name, is_right):
    """argparse type: a number for which `is_right` holds; `name` says which these are."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if is_right(value := float(text)):
                return int(value) if value.is_integer() and value < 1e15 else value  # 5, not 5.0
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {name}")

    return convert


def gamma_or_auto(text):
    """argparse type: a number that L(y_s) is compared with, or "auto"."""
    return text if text == "auto" else number_or_inf(text)


def whole_number(low, high):
    """argparse type: a whole number from `low` to `high`."""
    name = f"a whole number from {low} to {high:,}"
    return number(name, lambda x: low <= x <= high and x.is_integer())


positive_int = whole_number(1, 10**9)
positive_number = number("a number above 0 and below 1e15", lambda x: 0 < x < 1e15)
non_negative_number = number("a number of at least 0 and below 1e15", lambda x: 0 <= x < 1e15)
number_or_inf = number("a number of at least 0, or inf", lambda x: x >= 0)
fraction = number("a number from 0 to 1", lambda x: 0 <= x <= 1)


def info(text):
    """Print a line on stderr, above a progress bar; stdout is for results."""
    tqdm.write(text, file=sys.stderr)


def progress(iterable, total, desc="", unit="post", **options):
    """A tqdm bar on stderr, to be updated by hand where `iterable` is None."""
    options |= {"dynamic_ncols": True, "mininterval": 0.5}
    return tqdm(iterable, desc, total, unit=unit, **options)


def reading_progress(lines, path):
    """Yield what `read_lines` yields, with a bar if the file takes longer than half a second."""
    size = os.path.getsize(path) if os.path.isfile(path) else None
    options = {"unit_scale": True, "delay": 0.5, "leave": False}
    with progress(None, size, f"reading {Path(path).name}", "B", **options) as bar:
        for number, offset, raw in lines:
            if number % 1000 == 0:
                bar.update(offset - bar.n)
            yield number, offset, raw


def first_line(error):
    """The first line of an exception's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def reading(path, hint="is the copy whole?"):
    """Any error in the block becomes a UserError: `path` can't be read, and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library raises errors of its own for a broken file
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: can't be read ({reason}); {hint}") from None


@contextlib.contextmanager
def writing(path, hint="choose another --out"):
    """Make the folder of `path`; an OSError in the block becomes a UserError with the hint."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: can't be written ({reason}); {hint}") from None


@contextlib.contextmanager
def out_of_memory(hint):
    """Turn a GPU's out-of-memory error in the block into a UserError that ends with `hint`."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's own, without importing torch
            raise
        traceback.clear_frames(error.__traceback__)  # the frames hold the tensors that fill the GPU
        raise UserError(f"{str(error).partition('. GPU')[0]}; {hint}") from None


def read_json(path):
    """The JSON object in a file, as a dict. Raises UserError."""
    with reading(path, "copy it again"):
        return {**json.loads(Path(path).read_text(encoding="utf-8"))}  # a list is no mapping


def hide_loading_report():
    """Hide transformers' loading bars, warnings of weights (`load` has its own), of CPU kernels."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # A level of ERROR would make transformers check, and warn of, plans for tensor parallelism.
    weights_logger = logging.getLogger("transformers.modeling_utils")
    weights_logger.addFilter(lambda record: record.levelno >= logging.ERROR)
    if not torch.cuda.is_available():
        logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
