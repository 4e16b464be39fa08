"""A run's folder, its checkpoints, and a stop that loses nothing.

    out/run/settings.json        what the run was started with
    out/run/log.jsonl            a line a step, a line an evaluation
    out/run/step-600/            a model folder in Hugging Face layout, and what resuming needs
    out/run/last, out/run/best   small files that name a checkpoint

A checkpoint is written to out/run/.partial, which is then renamed: it is whole or not there at all.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

from evaluate import UserError, plural, shown
from support.adapters import ADAPTER, MORE_THAN_LORA, adapter_config, need_peft, write_adapter
from support.console import first_line, info, positive_int, read_json, reading, writing
from support.jsonl import follow_umask, write_atomic

OPTIMIZER, PROGRESS = "optimizer", "progress.json"
PROMPT_FILE, ENCODER_FILE = "prompt.txt", "encoder.json"  # how posts become a model's inputs
POINTERS = ("best", "last")
LIMITS = ("max_pixels", "max_length")
BY_CONTENT = {"train", "prompt_file"}  # settings that name a file whose content is compared
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")
MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.safetensors")


def find_model(name, files=MODEL_FILES):
    """The folder of what `--model` names: a run, a checkpoint, a model or adapter, or a hub name.

    Of a run it is the best checkpoint, else the last. From the hub only `files` are downloaded.
    Raises UserError.
    """
    folder = Path(checkpoint_of(name))
    if is_local(str(folder)):
        if not any((folder / file).is_file() for file in ("config.json", ADAPTER)):
            hint = "name a folder or a run that holds one, or one like Qwen/Qwen2.5-VL-3B-Instruct"
            raise UserError(f"{folder}: no model here; {hint}{runs_beside(folder)}")
        return folder
    with reading(name, f"it must be a local folder, or a model on the hub{runs_beside(folder)}"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(files)))


def checkpoint_of(name):
    """The checkpoint that a run's folder or one of its pointer files names; else `name` itself."""
    path = Path(name)
    pointers = [path, *(path / pointer for pointer in POINTERS)]
    return str(next(filter(None, map(read_pointer, pointers)), name))


def runs_beside(folder):
    """The end of a message: the runs that are where `folder` should be."""
    runs = sorted(str(file.parent) for file in folder.parent.glob("*/settings.json"))
    return f"; runs there: {', '.join(runs)}" if runs else ""


def is_local(name):
    """Whether a model's name is that of a folder; else it is one on the hub."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1


def base_of(folder):
    """The folder of the model that an adapter was made for. Raises UserError."""
    config = read_json(folder / ADAPTER)
    name = config.get("base_model_name_or_path")
    if config.get("peft_type") != "LORA" or not name or any(map(config.get, MORE_THAN_LORA)):
        needs = "must be a LoRA adapter with a base_model_name_or_path and without"
        raise UserError(f"{folder / ADAPTER}: {needs} {', '.join(MORE_THAN_LORA)}")
    need_peft()
    base = find_model(name)
    if (base / ADAPTER).is_file():
        raise UserError(f"{folder}: its base {base} is an adapter itself; merge that first")
    return base


def load_prompt_file(path, *fields):
    """The prompt in a file, which must contain each of `fields`. Raises UserError."""
    with reading(path, "a prompt is a UTF-8 text file"):
        prompt = Path(path).read_text(encoding="utf-8")
    for name in fields:
        if name not in prompt:
            raise UserError(f"{path}: the prompt has no {name} in it to say where that goes")
    return prompt


def read_own(folder):
    """What a model's folder, or an adapter's base, says of its inputs. Raises UserError.

    A dict of "prompt", "max_pixels" and "max_length", without those that it does not say.
    """
    own = read_own(base_of(folder)) if (folder / ADAPTER).is_file() else {}
    prompt, limits = folder / PROMPT_FILE, folder / ENCODER_FILE
    if prompt.is_file():
        own["prompt"] = load_prompt_file(prompt)
    if limits.is_file():
        with reading(limits, f"it needs {' and '.join(LIMITS)}, whole numbers above 0"):
            values = read_json(limits)
            own |= {name: positive_int(str(values[name])) for name in LIMITS}
    return own


def write_own(encoder, folder):
    """Write what `read_own` reads."""
    limits = {name: getattr(encoder, name) for name in LIMITS}
    (folder / PROMPT_FILE).write_text(encoder.prompt, encoding="utf-8")
    (folder / ENCODER_FILE).write_text(json.dumps(limits) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------- a run's folder


def write_pointer(run, pointer, name):
    """Let run/`pointer` (last or best) name the checkpoint `name`."""
    write_atomic(run / pointer, name + "\n")


def read_pointer(pointer):
    """The checkpoint folder that a pointer file names, None where there is no such file."""
    if pointer.name in POINTERS and pointer.is_file():
        return pointer.parent / pointer.read_text(encoding="utf-8").strip()


def list_checkpoints(run):
    """A run's checkpoints, its folders step-N, the oldest first; all others are the user's own."""
    found = (folder for folder in run.glob("step-*") if re.fullmatch("step-[0-9]+", folder.name))
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def open_run(folder, settings, free=(), resume=False, force=False):
    """Make or reopen a run's folder; `settings` is a dict that JSON can hold.

    Raises UserError where there is a run already, nothing to resume, or one that was started with
    other settings, but for the `free` ones. `force` allows these, but not another number of posts
    or batch size: a place in an epoch means nothing without them.
    """
    folder = Path(folder)
    found = list_checkpoints(folder)
    if resume:
        changed = changed_settings(folder, settings, free)
        if changed and (not force or not changed.keys().isdisjoint(("posts", "batch_size"))):
            text = f"{folder}: can't resume with other settings: {', '.join(changed.values())}; "
            raise UserError(f"{text}--force allows others, but for the posts and --batch-size")
    elif found or read_pointer(folder / "last"):
        raise UserError(f"{folder}: there is a run already; --resume it, or name another --out")
    file = folder / "settings.json"
    with writing(file):
        write_atomic(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    if found:  # a run killed right after a checkpoint was renamed did not get to name it
        write_pointer(folder, "last", found[-1].name)
    if (best := read_pointer(folder / "best")) and not best.is_dir():
        info(f"{folder / 'best'}: dropped, as {best.name} is not there")
        (folder / "best").unlink()


def changed_settings(folder, settings, free):
    """{setting: "it was this, is that"} between a run and how it is resumed. Raises UserError.

    What `settings` leaves to the model is completed from the last checkpoint.
    """
    before, ignored = read_json(folder / "settings.json"), BY_CONTENT.union(free)
    if found := list_checkpoints(folder):
        own = read_own(found[-1])
        before |= own
        settings |= {name: own[name] for name in own if settings.get(name) is None}
    changed = differences(before, settings)
    return {name: text for name, text in changed.items() if name not in ignored}


def differences(before, now):
    """{name: "it was this, is that"} for all that differs; a list is a file's size and time."""
    found = {}
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            is_file = isinstance(old or new, list)
            changed = "has changed" if old and new else "is another file"
            text = changed if is_file else f"was {shown(old)}, is {shown(new)}"
            found[name] = f"{name} {text}"
    return found


# ------------------------------------------------------------------------------ saving and resuming


def checkpoint_size(parameters, trained, adapter=False):
    """Bytes of a checkpoint: float32 weights (an adapter's alone) and AdamW's two averages."""
    return 4 * (trained if adapter else parameters) + 8 * trained


def checkpoints_kept(args, order, start=0):
    """(how many checkpoints stay, how many are saved after step `start`) of a run of train.py."""
    every, steps = args.save_every or len(order), range(start + 1, len(order) + 1)
    saved = sum(order.ends_epoch(step) or step % every == 0 for step in steps)
    return args.keep + bool(args.valid), saved


class Checkpoints:
    """Saves the checkpoints of a run, and restores the last one.

    model: the whole model or a sharded one; with an adapter on it, the adapter alone is saved.
    source: the folder that the model was read from, whose side files every checkpoint gets.
    """

    def __init__(self, run, model, optimizer, encoder, source, ranks):
        self.run, self.model, self.optimizer = run, model, optimizer
        self.encoder, self.source, self.ranks = encoder, source, ranks
        self.partial = run / ".partial"

    def save(self, step):
        """Save run/step-N and let `last` name it; on all ranks.

        The folder loads wherever the source does. Every rank writes its part of the optimizer's
        state, which any number of ranks can read. Raises UserError, with the last checkpoint
        untouched, if a weight is not finite or the disk is full.
        """
        folder = self.run / f"step-{step}"
        self.ranks.info(f"saving {folder} …")
        try:
            self.ranks.on_rank0(shutil.rmtree, self.partial, ignore_errors=True)
            state = optimizer_state(self.model, self.optimizer)
            self.ranks.on_all_ranks(write_state, state, self.partial / OPTIMIZER)
            weights = full_state_dict(self.model, sharded=self.ranks.engine == "fsdp")
            self.ranks.on_rank0(self.finish, weights, step, folder)
        except Exception as error:  # safetensors raises an error of its own for a full disk
            if self.ranks.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            text = f"{folder}: the checkpoint could not be saved ({first_line(error)})"
            kept = "; --resume goes on from the last one" if (self.run / "last").is_file() else ""
            raise self.ranks.error(text + kept) from error

    def finish(self, weights, step, folder):
        """Write what rank 0 alone writes, and give the checkpoint its name."""
        partial = self.partial
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("some weights are not finite: try a lower --lr")
        if adapter_config(self.model):
            write_adapter(self.model, weights, partial)
        else:
            self.model.save_pretrained(partial, state_dict=weights)
        # When a run was resumed, its source is a checkpoint that may be pruned; the last one isn't.
        copy_side_files(read_pointer(self.run / "last") or self.source, partial)
        write_own(self.encoder, partial)
        (partial / PROGRESS).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        follow_umask(partial)
        for file in filter(Path.is_file, partial.rglob("*")):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        os.rename(partial, folder)
        write_pointer(self.run, "last", folder.name)

    def restore(self):
        """Read the last checkpoint's optimizer state; returns its step, 0 where there is none.

        Raises UserError.
        """
        folder = self.ranks.from_rank0(read_pointer, self.run / "last")
        if folder is None:
            return 0
        state = optimizer_state(self.model, self.optimizer)
        return self.ranks.on_all_ranks(read_state, state, folder)

    def check_space(self, args, order, start):
        """Raise UserError where the disk has no room for what the run will keep.

        A checkpoint is written before an older one is removed.
        """
        kept, saved = checkpoints_kept(args, order, start)
        count = min(saved, kept + 1 - len(list_checkpoints(self.run)))
        parameters = list(self.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total, adapter = sum(p.numel() for p in parameters), bool(adapter_config(self.model))
        size, free = checkpoint_size(total, trained, adapter), shutil.disk_usage(self.run).free
        if count * size > free:
            needs = f"{plural(count, 'checkpoint')} of {size / 1e9:.1f} GB will be written"
            told = f"{self.run}: {free / 1e9:.1f} GB are free, and {needs}"
            raise UserError(f"{told}; make room, lower --keep, or choose another --out")

    def prune(self, keep):
        """Remove all checkpoints but the newest `keep` and those that `last` and `best` name."""
        if self.ranks.rank == 0:
            named = [read_pointer(self.run / name) for name in POINTERS]
            for folder in list_checkpoints(self.run)[:-keep]:
                if folder not in named:
                    shutil.rmtree(folder, ignore_errors=True)


def copy_side_files(source, folder):
    """Copy what a model's folder holds beside its weights (config, tokenizer, template, …)."""
    for file in Path(source).iterdir():
        other = not file.name.endswith(WEIGHTS) and file.name not in (PROGRESS, PROMPT_FILE)
        if file.is_file() and other:
            shutil.copyfile(file, folder / file.name)


def full_tensor(tensor):
    """The whole tensor, on every rank; of a sharded one all ranks must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state_dict(model, sharded):
    """The state dict of full tensors, or of an adapter's.

    Sharded ones are gathered one by one into the memory of rank 0's CPU; the other ranks get none.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = {"cpu_offload": sharded, "ignore_frozen_params": bool(adapter_config(model))}
    options = StateDictOptions(full_state_dict=True, **options)
    weights = get_model_state_dict(model, options=options)
    # A tied tensor, once gathered, is two.
    return {name: weights[name] for name in weights if name not in model.all_tied_weights_keys}


def optimizer_state(model, optimizer):
    """AdamW's state as a flat dict of tensors, `parameter/exp_avg`; zeros before the first step."""
    import torch

    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = optimizer.state[parameter]
            if not own:
                own["step"] = torch.zeros((), device=parameter.device)
                own["exp_avg"] = torch.zeros_like(parameter)
                own["exp_avg_sq"] = torch.zeros_like(parameter)
            state |= {f"{name}/{key}": value for key, value in own.items()}
    return state


def write_state(state, folder):
    """Write a dict of tensors, sharded or not, for any number of ranks to read."""
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with plain_errors():
        checkpoint.save(state, storage_writer=writer)


def read_state(state, folder):
    """Read what `write_state` wrote to a checkpoint into `state`; returns the checkpoint's step."""
    from torch.distributed import checkpoint

    reader = checkpoint.HuggingFaceStorageReader(str(folder / OPTIMIZER))
    with reading(folder, "remove it to resume from the one before"):
        with plain_errors():
            checkpoint.load(state, storage_reader=reader)
        return read_json(folder / PROGRESS)["step"]


@contextlib.contextmanager
def plain_errors():
    """Unwrap what torch.distributed.checkpoint raises: its own error is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


class Stop:
    """SIGTERM and SIGINT set `asked`; the loop checks it after each step.

    A context manager. A second SIGINT, or a signal inside `at_once()`, ends the process. A second
    SIGTERM does not: a cluster's scheduler and torchrun may both send one to each rank.
    """

    def __init__(self):
        self.asked = None  # the signal's number

    def __enter__(self):
        signals = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self.handle) for number in signals}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.asked = number
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    @contextlib.contextmanager
    def at_once(self):
        """In this block nothing can be lost, so that a signal ends it at once."""
        self.__exit__()
        yield
        self.__enter__()

    def leave(self):
        """Exit with the code of the signal."""
        sys.exit(128 + (self.asked or signal.SIGTERM))
