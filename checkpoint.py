"""What a run needs besides its loop: checkpoints that are whole or not there at all, going on from one, a stop
that loses nothing, and several processes that train one model.

    out/run/settings.json        what the run was started with
    out/run/log.jsonl            a line a step, a line an evaluation
    out/run/step-600/            a model folder in Hugging Face layout, and what resuming needs
    out/run/last, out/run/best   small files that name a checkpoint

Processes are torchrun's: DDP where every GPU can hold the whole of model and optimizer, else FSDP2.
"""

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

from data import say, write_whole
from evaluate import UserError

OPTIMIZER, PROGRESS = "optimizer", "progress.json"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")


# ----------------------------------------------------------------------------------------- a run's folder


def model_folder(name):
    """What `--model` means: the checkpoint that a run's folder (its best, else its last) or one of its pointer
    files names; any other name is itself. Raises UserError for a run without one."""
    path = Path(name)
    for pointer in (path, path / "best", path / "last"):
        if pointer.name in ("best", "last") and pointer.is_file():
            return str(pointed_at(pointer))
    if (path / "settings.json").is_file():
        raise UserError(
            f"{name}: this run has no checkpoint yet; train.py saves one at the end of each epoch and of the run, and "
            "with --save-every in between"
        )
    return name


def point(run, pointer, name):
    """Let run/`pointer` (last or best) name the checkpoint `name`."""
    write_whole(run / pointer, name + "\n")


def pointed_at(pointer):
    """The checkpoint folder that a pointer file names. Raises UserError where it isn't there."""
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not folder.is_dir():
        raise UserError(
            f"{pointer}: names {folder.name}, which is not there; name a checkpoint folder instead"
        )
    return folder


def step_of(folder):
    """The N of a folder step-N."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(run):
    """A run's whole checkpoints, the oldest first."""
    return sorted(
        (folder for folder in run.glob("step-*") if (folder / PROGRESS).is_file()), key=step_of
    )


def open_run(folder, settings, resume=False, force=False, keep=("posts", "batch_size")):
    """Make or reopen a run's folder; `settings` is a dict that JSON can hold. Returns its Path.

    Raises UserError where there is a run already and `resume` wasn't asked for, or nothing to resume, or
    where it was started with other settings. `force` goes on with other settings all the same, but not with
    others of those in `keep`, without which a place in an epoch means nothing.
    """
    folder = Path(folder)
    file = folder / "settings.json"
    if resume:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            raise UserError(
                f"{folder}: no run to resume here; leave out --resume to start one"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{file}: damaged ({error}); its checkpoints are models to start from all the same: name one with "
                "--model, and another folder with --out"
            ) from None
        changed = [
            name
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        differences = ", ".join(
            f"{name} was {before.get(name)!r}, is {settings.get(name)!r}" for name in changed
        )
        if changed and (not force or not set(keep).isdisjoint(changed)):
            raise UserError(
                f"{folder}: can't resume with other settings: {differences}"
                + ("" if force else "; --force goes on all the same")
            )
        if changed:
            say(f"{folder}: going on with other settings: {differences}")
    elif (folder / "last").exists() or checkpoints(
        folder
    ):  # what stopped before its first has nothing to lose
        raise UserError(
            f"{folder}: there is a run already; go on with --resume, or name another folder with --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{folder}: can't write a run there ({error.strerror}); name another with --out"
        ) from None
    # A run that was killed right after a checkpoint was whole may not have come to name it.
    if resume and (whole := checkpoints(folder)):
        point(folder, "last", whole[-1].name)
    return folder


def prune(run, keep=1):
    """Remove every checkpoint but the newest `keep` and the one that `best` names, and what is left of cut saves."""
    kept = {folder.name for folder in checkpoints(run)[-keep:]}
    kept |= {
        pointed_at(run / pointer).name for pointer in ("last", "best") if (run / pointer).is_file()
    }
    for folder in [*run.glob("step-*"), *run.glob(".step-*")]:
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


# ----------------------------------------------------------------------------------- saving and going on


def save(run, step, model, source, prompt, optimizer, processes):
    """Save a checkpoint as run/step-N and let `last` name it.

    model: saved under its source's weight names, whole, beside the source's own side files, so that it loads
    wherever its source does; with an adapter on it, only that, in peft's layout. Of the optimizer's state every
    process writes its own part, and any number of processes can go on from it. A save that is cut short leaves only
    a hidden folder that nothing names. Raises UserError (with the last checkpoint untouched) if a weight is not
    finite or the disk won't take it.
    """
    if processes.any(
        not all(local(parameter).isfinite().all() for parameter in model.parameters())
    ):
        raise processes.shared(
            f"step {step}: there are weights that are not finite, which are not saved; the last "
            "checkpoint is kept; try a lower --lr"
        )
    name = f"step-{step}"
    folder, partial = run / name, run / f".{name}.partial"
    if (folder / PROGRESS).is_file():  # --save-every and the end of an epoch may fall together
        return

    def begin():
        shutil.rmtree(partial, ignore_errors=True)
        (partial / OPTIMIZER).mkdir(parents=True)

    def finish(weights):
        write_model(model, weights, partial)
        # A resumed run's source is a checkpoint that pruning removes; the last one has the same files.
        copy_side_files(pointed_at(run / "last") if (run / "last").is_file() else source, partial)
        (partial / "prompt.txt").write_text(prompt, encoding="utf-8")
        (partial / PROGRESS).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        os.rename(partial, folder)
        point(run, "last", name)

    try:
        processes.main_only(begin)
        processes.together(write_state, optimizer_state(model, optimizer), partial / OPTIMIZER)
        weights = whole_weights(model, processes.rank == 0)
        processes.main_only(finish, weights)
    except Exception as error:  # safetensors has an error type of its own for a full disk
        if processes.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())[:300]
        raise processes.shared(
            f"{folder}: the checkpoint could not be saved ({reason}); the one before it is kept: "
            "make room and go on with --resume"
        ) from error


def write_model(model, weights, folder):
    """Write `weights`, those of a model or of its adapter, as Hugging Face's libraries do."""
    from model import adapter_of, write_adapter

    if adapter_of(model):
        write_adapter(model, weights, folder)
    else:
        model.save_pretrained(folder, state_dict=weights)


def merge(name, out):
    """Write the model that an adapter's folder (or run) and its base make together as a folder of its own, in float32.

    Raises UserError where `name` is no adapter or `out` is there already.
    """
    from model import adapter_of, load, merge

    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: is there already; name another folder for the merged model")
    model, encoder, source = load(model_folder(name))
    if not adapter_of(model):
        raise UserError(f"{source}: no adapter, but a whole model already")
    merge(model)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        copy_side_files(model.name_or_path, partial)
        (partial / "prompt.txt").write_text(encoder.prompt, encoding="utf-8")
        os.rename(partial, out)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{out}: the merged model could not be written ({error})") from None


def copy_side_files(source, folder):
    """Carry over everything of a model's folder that isn't weights (config, tokenizer, template, …)."""
    for file in Path(source).iterdir():
        if (
            file.is_file()
            and not file.name.endswith(WEIGHTS)
            and file.name not in (PROGRESS, "prompt.txt")
        ):
            shutil.copyfile(file, folder / file.name)


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def local(tensor):
    """The part of a tensor that this process holds: all of it where it isn't sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor):
    """The whole of a tensor, on every process; where it is sharded all of them must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_weights(model, keep):
    """The model's state dict of whole tensors where `keep` is true, gathered one by one; {} in other processes.

    What is tied stays one tensor; what was sharded is in the CPU's memory. Of a model with an adapter only that.
    """
    from model import adapter_of

    gathered, result = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if adapter_of(model) and not tensor.requires_grad:
            continue
        if id(tensor) not in gathered:
            value = whole(tensor.detach())
            gathered[id(tensor)] = (value.cpu() if is_sharded(tensor) else value) if keep else None
        result[name] = gathered[id(tensor)]
    return result if keep else {}


def optimizer_state(model, optimizer):
    """AdamW's state as a flat dict of tensors, `parameter/exp_avg`; made, all zeros, where it isn't there yet."""
    import torch

    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = optimizer.state[parameter]
            if not own:
                own["step"] = torch.zeros((), device=parameter.device)
                own["exp_avg"], own["exp_avg_sq"] = (
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )
            state |= {f"{name}/{key}": value for key, value in own.items()}
    return state


@contextlib.contextmanager
def plain_errors():
    """What torch.distributed.checkpoint wraps in an error of its own, which is no Exception, comes out as it was raised.

    It also remarks on every use by one process, which is all that many runs have.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


def write_state(state, folder):
    """Write a dict of tensors, sharded or not, as safetensors that any number of processes can read."""
    from torch.distributed import checkpoint
    from torch.distributed import is_initialized

    with plain_errors():
        checkpoint.save(
            state,
            storage_writer=checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True),
            no_dist=not is_initialized(),
        )


def restore(run, model, optimizer):
    """Read the last checkpoint's optimizer state into `optimizer`; returns its step.

    The weights are those of the model that was loaded from that checkpoint.
    """
    from torch.distributed import checkpoint
    from torch.distributed import is_initialized

    folder = pointed_at(run / "last")
    try:
        with plain_errors():
            checkpoint.load(
                optimizer_state(model, optimizer),
                no_dist=not is_initialized(),
                storage_reader=checkpoint.HuggingFaceStorageReader(str(folder / OPTIMIZER)),
            )
        return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["step"]
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: what resuming needs can't be read ({reason}); remove this folder to go on from the "
            "checkpoint before it, if one was kept"
        ) from error


# ------------------------------------------------------------------------------------------------ stopping


@contextlib.contextmanager
def enough_memory(mend):
    """A GPU whose memory is full in the block is a UserError that ends with `mend`."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; it need not have been imported
            raise
        traceback.clear_frames(
            error.__traceback__
        )  # what fills the memory hangs on them, as does the process group
        raise UserError(f"{str(error).partition('. GPU')[0]}; {mend}") from None


class Stop:
    """Turns the first SIGTERM or SIGINT into a wish, `asked`, that the loop grants between steps; a context manager.

    Inside `at_once()`, where nothing can be lost, and at the second signal it is a KeyboardInterrupt.
    """

    def __init__(self):
        self.asked, self.patient = (
            None,
            True,
        )  # the signal's number; whether there is something to lose

    def __enter__(self):
        self.before = {
            number: signal.signal(number, self.take) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def take(self, number, frame):
        again, self.asked = self.asked, number
        if again or not self.patient:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self):
        if self.asked:
            raise KeyboardInterrupt
        self.patient = False
        try:
            yield
        finally:
            self.patient = True

    def leave(self, text, processes):
        """End the process as the signal would have, with a word."""
        if processes.rank == 0:
            say(text)
        sys.exit(128 + (self.asked or signal.SIGTERM))


# ------------------------------------------------------------------------------------- several processes


class Told(UserError):
    """A mistake that the first process tells for all."""


class Processes:
    """The processes that train one model: torchrun's, each with its own device, or just this one.

    rank and size are torchrun's RANK and WORLD_SIZE, device is this process's torch.device, and engine is "ddp",
    "fsdp" or None for a single process. A context manager: it leaves the group at the end, and lets only the first
    process tell a mistake that all have made.
    """

    def __init__(self, device, parallel="auto"):
        from model import pick_device

        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.parallel, self.engine, self.module = parallel, None, None
        self.many = "RANK" in os.environ and self.size > 1
        if self.many:
            import torch

            if device in ("auto", "cuda") and torch.cuda.is_available():
                device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = pick_device(device)
        if self.many:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            # Rank 0 may write a large checkpoint while the others wait.
            torch.distributed.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # DDP holds the process group, too. Where its hold is the last, ending waits for gloo's threads with the
        # interpreter locked, for which these wait in turn: let it go first, out of an error's frames as well.
        self.module = None
        traceback.clear_frames(trace)
        gc.collect()
        if kind is None and self.many:
            import torch

            torch.distributed.destroy_process_group()
        if isinstance(error, Told):
            sys.exit(1)

    def shared(self, text):
        """The error to raise for a mistake that all processes find."""
        return Told(text) if self.rank else UserError(text)

    def together(self, function, *args, **kwargs):
        """Call a function in every process at once; what one of them raises ends all of them."""
        result = error = None
        try:
            result = function(*args, **kwargs)
        except Exception as caught:
            error = caught
        told = next(filter(None, self.gather([error and (str(error) or repr(error))])), None)
        if error is not None and (self.rank == 0 or not isinstance(error, UserError)):
            raise error
        if told:
            raise self.shared(told)
        return result

    def main_only(self, function, *args, **kwargs):
        """Call a function in the first process only and return its result there, None elsewhere; its error is all's."""
        return self.together(
            function if self.rank == 0 else lambda *args, **kwargs: None, *args, **kwargs
        )

    def main_first(self, function, *args, **kwargs):
        """Call a function in every process, in the first one before the others: one mistake is found, and told, once."""
        result = self.main_only(function, *args, **kwargs)
        return result if self.rank == 0 else function(*args, **kwargs)

    def seed(self, seed, step):
        """Let what a model draws at random (dropout) depend on these alone: nothing of it has to be saved."""
        import torch

        torch.manual_seed(hash((seed, step, self.rank)))

    def gather(self, items):
        """The items of a list from every process, in the order of the processes."""
        if not self.many:
            return items
        from torch.distributed import all_gather_object

        lists = [None] * self.size
        all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def sum(self, tensor):
        """The sum of a tensor over all processes, in place."""
        if self.many:
            from torch.distributed import all_reduce

            all_reduce(tensor)
        return tensor

    def count(self, number):
        """The sum of a number over all processes, on the device; at least 1, since it is divided by."""
        import torch

        return self.sum(torch.tensor(number, device=self.device)).clamp(min=1)

    def any(self, flag):
        """Whether a flag is true in any process."""
        import torch

        return (
            bool(flag)
            if not self.many
            else bool(self.sum(torch.tensor(int(bool(flag)), device=self.device)))
        )

    def spread(self, step_losses):
        """Let the processes share a DynamicCoT module whose weights the first process has read; returns the module.

        FSDP2 shards float32 weights, gradients and optimizer state, computes in bf16 on CUDA and adds gradients up in
        float32.
        """
        if not self.many:
            return step_losses.to(self.device)
        import torch

        size = sum(
            16 * p.numel() if p.requires_grad else p.nbytes for p in step_losses.parameters()
        )
        self.engine = (
            self.parallel if self.parallel != "auto" else "ddp" if self.fits(size) else "fsdp"
        )
        values = [tensor.detach() for tensor in tensors_of(step_losses)]
        if self.engine == "ddp":
            step_losses.to(self.device)
        else:
            shard(step_losses, self.device)
        for tensor, value in zip(tensors_of(step_losses), values):
            broadcast(tensor, value.to(self.device))
        if self.engine == "ddp":
            self.module = step_losses = torch.nn.parallel.DistributedDataParallel(
                step_losses, gradient_as_bucket_view=True, init_sync=False
            )
        return step_losses

    def fits(self, size):
        """Whether so many bytes take up no more than half of the device's memory."""
        import torch

        return (
            self.device.type != "cuda"
            or size <= torch.cuda.get_device_properties(self.device).total_memory / 2
        )

    def passes(self, micro_batches):
        """The micro-batches of a step on this process's device; DDP exchanges gradients only with the last one."""
        for left, batch in zip(range(len(micro_batches) - 1, -1, -1), micro_batches):
            if self.engine == "ddp":
                self.module.require_backward_grad_sync = left == 0
            yield batch.to(self.device)

    def whole_model(self, model):
        """A model to generate with, each process at its own pace: `model` itself, or where it is sharded a whole copy."""
        if self.engine != "fsdp":
            return model
        import torch

        from model import adapter_of, empty_model, with_adapter

        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        copy = empty_model(model.config, dtype, self.device)
        copy.generation_config = model.generation_config
        if config := adapter_of(model):
            copy = with_adapter(copy, config)
        with torch.no_grad():
            for own, sharded in zip(tensors_of(copy), tensors_of(model)):
                own.copy_(whole(sharded))
        return copy


def tensors_of(module):
    """A module's parameters and buffers, those that are tied once."""
    return [*module.parameters(), *module.buffers()]


def shard(step_losses, device):
    """FSDP2: each layer of the language model and of the vision tower by itself, and the rest together."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if device.type == "cuda" else None, reduce_dtype=torch.float32
    )
    inner = step_losses.model.model
    for layer in (*inner.visual.blocks, *inner.language_model.layers, step_losses):
        fully_shard(layer, mesh=mesh, mp_policy=policy)


def broadcast(tensor, value):
    """Give a tensor, sharded or not, the first process's `value`."""
    import torch
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        if is_sharded(tensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.to_local().copy_(value.to_local())
        else:
            torch.distributed.broadcast(value, 0)
            tensor.copy_(value)
