"""A run's folder: checkpoints that are whole or not there at all, and going on from one.

    out/run/settings.json        what the run was started with
    out/run/log.jsonl            a line a step, a line an evaluation
    out/run/step-600/            a model folder in Hugging Face layout, and what resuming needs
    out/run/last, out/run/best   small files that name a checkpoint
"""

import json
import os
import shutil
from pathlib import Path

from data import write_whole
from evaluate import UserError

OPTIMIZER, PROGRESS = "optimizer.safetensors", "progress.json"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")


def model_folder(name):
    """What `--model` means: the checkpoint that a run's folder (its best, else its last) or one of its pointer
    files names; any other name is itself. Raises UserError for a run without one."""
    path = Path(name)
    for pointer in (path, path / "best", path / "last"):
        if pointer.name in ("best", "last") and pointer.is_file():
            return str(pointed_at(pointer))
    if (path / "settings.json").is_file():
        raise UserError(f"{name}: this run has no checkpoint yet; train.py saves one at the end of each epoch")
    return name


def point(run, pointer, name):
    """Let run/`pointer` (last or best) name the checkpoint `name`."""
    write_whole(run / pointer, name + "\n")


def pointed_at(pointer):
    """The checkpoint folder that a pointer file names. Raises UserError where it isn't there."""
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not folder.is_dir():
        raise UserError(f"{pointer}: names {folder.name}, which is not there; name a checkpoint folder instead")
    return folder


def open_run(folder, settings, resume):
    """Make or reopen a run's folder; `settings` is a dict that JSON can hold. Returns its Path.

    Raises UserError where there is a run already and `resume` wasn't asked for, or nothing to resume, or
    where it was started with other settings.
    """
    folder = Path(folder)
    file = folder / "settings.json"
    if resume:
        if not file.is_file():
            raise UserError(f"{folder}: no run to resume here; leave out --resume to start one")
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in sorted(before.keys() | settings.keys()) if before.get(name) != settings.get(name)]
        if changed:
            differences = ", ".join(f"{name} was {before.get(name)!r}, is {settings.get(name)!r}" for name in changed)
            raise UserError(f"{folder}: can't resume with other settings: {differences}")
        return folder
    if (folder / "last").exists():  # what stopped before its first checkpoint has nothing to lose
        raise UserError(f"{folder}: there is a run already; go on with --resume, or name another folder with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: can't write a run there ({error.strerror}); name another with --out") from None
    return folder


def save(run, step, model, source, prompt, optimizer):
    """Save a checkpoint as run/step-N and let `last` name it.

    model: saved under its source's weight names, beside the source's own side
    files, so that it loads wherever its source does. A save that is cut short leaves only a hidden folder
    that nothing names. Raises UserError (with the last checkpoint untouched) if a weight is not finite or the
    disk won't take it.
    """
    from safetensors.torch import save_file

    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"step {step}: there are weights that are not finite, which are not saved; the last "
                        "checkpoint is kept; try a lower --lr")
    name = f"step-{step}"
    folder, partial = run / name, run / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        # A resumed run's source is a checkpoint that pruning removes; the last one has the same files.
        copy_side_files(pointed_at(run / "last") if (run / "last").is_file() else source, partial)
        (partial / "prompt.txt").write_text(prompt, encoding="utf-8")
        save_file(optimizer_tensors(model, optimizer), partial / OPTIMIZER)
        (partial / PROGRESS).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if folder.exists():  # left by a run that stopped before `last` could name it
            shutil.rmtree(folder)
        os.rename(partial, folder)
        point(run, "last", name)
    except Exception as error:  # safetensors has an error type of its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: the checkpoint could not be saved ({error}); the one before it is kept: "
                        "make room and go on with --resume") from error


def copy_side_files(source, folder):
    """Carry over everything of a model's folder that isn't weights (config, tokenizer, template, …)."""
    for file in Path(source).iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS) and file.name not in (PROGRESS, "prompt.txt"):
            shutil.copyfile(file, folder / file.name)


def prune(run):
    """Remove every checkpoint that neither `last` nor `best` names."""
    named = {pointed_at(run / pointer).name for pointer in ("last", "best") if (run / pointer).is_file()}
    for folder in [*run.glob("step-*"), *run.glob(".step-*.partial")]:
        if folder.name not in named:
            shutil.rmtree(folder, ignore_errors=True)


def optimizer_tensors(model, optimizer):
    """The optimizer's state as a flat dict of tensors, by parameter name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[parameter]}/{key}": value.contiguous()
            for parameter, state in optimizer.state.items() for key, value in state.items()}


def restore(run, model, optimizer):
    """Read the run's last checkpoint's optimizer state into `optimizer`; returns its step.

    The weights are those of the model that was loaded from that checkpoint.
    """
    from safetensors.torch import load_file

    folder = pointed_at(run / "last")
    tensors = load_file(folder / OPTIMIZER)
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, key = key.rpartition("/")
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
    return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["step"]
