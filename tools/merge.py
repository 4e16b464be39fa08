"""Add an adapter (LoRA) to its base and write the two as one whole model, in float32.

python -m tools.merge out/run1 out/merged
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from evaluate import UserError, run
from support.adapters import adapter_config, merge_adapter
from support.checkpoint import copy_side_files, write_own
from support.console import ArgumentParser, info, writing
from support.jsonl import follow_umask, locked


def merge(name, out):
    """Write the whole model of an adapter's folder, or of its run, to the folder `out`.

    `out` gets the base's side files and the adapter's prompt, and appears only once it is whole.
    Raises UserError if `name` has no adapter, or if `out` exists or can't be written.
    """
    from model import load

    if out.exists():
        raise UserError(f"{out}: is there already; name another folder for the merged model")
    info(f"loading {name} …")
    model, encoder, source = load(name)
    if not adapter_config(model):
        raise UserError(f"{source}: no adapter, but a whole model already")
    merge_adapter(model)
    hidden = f".{out.name}."
    with writing(out, "make room"), TemporaryDirectory(dir=out.parent, prefix=hidden) as folder:
        partial = Path(folder) / out.name
        partial.mkdir()
        model.save_pretrained(partial)
        copy_side_files(model.name_or_path, partial)
        write_own(encoder, partial)
        follow_umask(partial)
        partial.rename(out)


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a run with an adapter, or the adapter's folder")
    parser.add_argument("out", type=Path, help="folder for the merged model; must not exist")
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    with locked(args.out):
        merge(args.model, args.out)
    info(f"{args.out}: the merged model, in float32")


if __name__ == "__main__":
    run(main)
