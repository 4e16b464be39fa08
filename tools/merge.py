"""Add an adapter (LoRA) to its base and write the two as one whole model, in float32.

python -m tools.merge out/run1 out/merged
"""

import os
import shutil
from pathlib import Path

from evaluate import UserError, run
from support.adapters import adapter_config, merge_adapter
from support.bars import busy
from support.checkpoint import copy_side_files, write_own
from support.console import ArgumentParser, first_line, info
from support.jsonl import follow_umask, locked


def merge(name, out):
    """Write the whole model of an adapter's folder, or of its run, to the folder `out`.

    `out` gets the base's side files and the adapter's prompt, and appears only once it is whole.
    Raises UserError if `name` has no adapter, or if `out` exists or can't be written.
    """
    from model import load

    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: is there already; name another folder for the merged model")
    with busy(f"loading {name}"):
        model, encoder, source = load(name)
    if not adapter_config(model):
        raise UserError(f"{source}: no adapter, but a whole model already")
    merge_adapter(model)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        copy_side_files(model.name_or_path, partial)
        write_own(encoder, partial)
        follow_umask(partial)
        os.rename(partial, out)
    except Exception as error:  # the libraries raise errors of their own
        shutil.rmtree(partial, ignore_errors=True)
        mend = "make room, or choose another folder"
        raise UserError(f"{out}: can't be written ({first_line(error)}); {mend}") from None


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a run with an adapter, or the adapter's folder")
    parser.add_argument("out", help="folder for the merged model; must not exist")
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    with locked(args.out):
        merge(args.model, args.out)
    size = sum(file.stat().st_size for file in Path(args.out).glob("*.safetensors"))
    info(f"{args.out}: the merged model, in float32, {size / 1e6:,.0f} MB")


if __name__ == "__main__":
    run(main)
