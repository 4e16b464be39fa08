"""The ranks of a training run: this process alone, or torchrun's processes with DDP or FSDP2."""

import gc
import os
import traceback
from datetime import timedelta

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from evaluate import UserError
from support.console import info, reading

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def torchrun_ranks():
    """(rank, world_size, rank on this machine) by torchrun's variables; (0, 1, 0) without them.

    Raises UserError where some of them are missing.
    """
    if os.environ.keys().isdisjoint(TORCHRUN[:3]):  # a cluster may set the others for every job
        return 0, 1, 0
    with reading(f"{', '.join(TORCHRUN)} in the environment", "start with torchrun, or unset them"):
        rank, world_size, local_rank, _, _ = (os.environ[name] for name in TORCHRUN)
        return int(rank), int(world_size), int(local_rank)


def compute_dtype(device):
    """bfloat16 on a GPU that has it (compute capability 8.0 and up), else float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def pick_device(name):
    """The torch.device called `name`; `auto` is cuda where there is one, else cpu.

    Raises UserError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(f"--device {name}", "try auto or cpu"):
        device = torch.device(name)
        torch.empty(1, device=device)
        return device


class Ranks:
    """The processes that train one model together; a context manager.

    rank and world_size are torchrun's, device is this process's torch.device, and engine is "ddp",
    "fsdp" or None for a single process. Of a mistake that all ranks make, rank 0 alone reports it.
    """

    def __init__(self, device="auto", parallel="auto"):
        self.rank, self.world_size, local_rank = torchrun_ranks()
        self.parallel, self.engine, self.ddp = parallel, None, None
        self.distributed = self.world_size > 1
        if self.distributed and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{local_rank}"
        self.device = pick_device(device)
        if self.distributed:
            self.meet()

    def meet(self):
        """Join the other ranks. Raises UserError."""
        self.info(f"waiting for {self.world_size} ranks …")
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "nccl"
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        with reading(place, "ranks meet there; is this the address of rank 0?"):
            # Rank 0 may write a large checkpoint while the others wait.
            torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # If DDP held the process group last, its end would wait for gloo's threads with the
        # interpreter locked, and they for the interpreter. An error's frames hold DDP, too.
        self.ddp = None
        traceback.clear_frames(trace)
        gc.collect()
        if kind is None and self.distributed:
            torch.distributed.destroy_process_group()

    # ------------------------------------------------------------------ who does what, and errors

    def info(self, text):
        """Print a line on rank 0's stderr."""
        if self.rank == 0:
            info(text)

    def error(self, text):
        """What to raise for a mistake that all ranks find: rank 0 reports it, the others leave."""
        return SystemExit(1) if self.rank else UserError(text)

    def on_all_ranks(self, function, *args, **kwargs):
        """Call a function on every rank at once; an error on one rank ends all of them."""
        result = error = None
        try:
            result = function(*args, **kwargs)
        except Exception as caught:
            error = caught
        messages = self.all_gather([error and (str(error) or repr(error))])
        if error is not None and (self.rank == 0 or not isinstance(error, UserError)):
            raise error
        if message := next(filter(None, messages), None):
            raise self.error(message)
        return result

    def on_rank0(self, function, *args, **kwargs):
        """Call a function on rank 0; its result there, None elsewhere. An error ends all ranks."""
        return self.on_all_ranks(lambda: None if self.rank else function(*args, **kwargs))

    def from_rank0(self, function, *args, **kwargs):
        """Call a function on rank 0 and return its result on every rank.

        What is wrong for all is then reported once, a download is done once, and what was found
        on a disk is the same for all, whatever a network folder shows them.
        """
        result = [self.on_rank0(function, *args, **kwargs)]
        if self.distributed:
            torch.distributed.broadcast_object_list(result)
        return result[0]

    def seed(self, seed, step):
        """Seed what is drawn at random (dropout) for a step, so that no state has to be saved."""
        torch.manual_seed(hash((seed, step, self.rank)))

    # -------------------------------------------------------------------------------- collectives

    def all_gather(self, items):
        """The items of a list from every rank, in the order of the ranks."""
        if not self.distributed:
            return items
        lists = [None] * self.world_size
        torch.distributed.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def all_reduce(self, numbers):
        """The sums over all ranks of a list of numbers, or of a tensor's values, as a list."""
        if self.distributed:
            numbers = torch.as_tensor(numbers, device=self.device)
            torch.distributed.all_reduce(numbers)
        return numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers

    def total(self, number):
        """The sum of a number over all ranks."""
        return self.all_reduce([number])[0]

    def any(self, flag):
        """Whether a flag is true on any rank."""
        return self.total(int(bool(flag))) > 0

    # ---------------------------------------------------------------------------------- the model

    def wrap_model(self, training_step):
        """Prepare the training step's module for all ranks; rank 0 has read the weights.

        DDP where the whole training state takes at most half of a GPU's memory, else FSDP2: it
        shards float32 weights, gradients and optimizer state, computes in bf16 on CUDA and reduces
        gradients in float32. Returns the module.
        """
        if not self.distributed:
            return training_step.to(self.device)
        large = False
        if self.device.type == "cuda":
            parameters = training_step.parameters()
            state = (16 * p.numel() if p.requires_grad else p.nbytes for p in parameters)
            memory = torch.cuda.get_device_properties(self.device).total_memory
            large = sum(state) > memory / 2
        auto = "fsdp" if self.any(large) else "ddp"
        self.engine = auto if self.parallel == "auto" else self.parallel
        run_all_layers(training_step)
        if self.engine == "ddp":  # sends rank 0's weights to all
            self.ddp = torch.nn.parallel.DistributedDataParallel(
                training_step.to(self.device), gradient_as_bucket_view=True
            )
            return self.ddp
        shard(training_step, self.device)
        return training_step

    def on_device(self, micro_batches):
        """Yield a step's micro-batches on the device; of a single process none without a post.

        DDP averages gradients over the ranks in the last one's backward pass, FSDP in each.
        """
        for batch in micro_batches:
            if self.ddp is not None:
                self.ddp.require_backward_grad_sync = batch is micro_batches[-1]
            if len(batch) or self.distributed:
                yield batch.to(self.device)

    def drop_unused_gradients(self, model, micro_batches):
        """Remove the gradients, all zero, of what no post of a step used on any rank.

        AdamW would move these weights: by weight decay, and by its mean of earlier gradients.
        """
        images = sum("pixel_values" in batch.prompt for batch in micro_batches)
        samples, images = self.all_reduce([sum(map(len, micro_batches)), images])
        unused = [] if images else model.model.visual.parameters()
        for parameter in unused if samples else model.parameters():
            parameter.grad = None


def run_all_layers(training_step):
    """Let a rank run all layers, as the others do, where its micro-batch has no image or no post.

    DDP and FSDP need the same layers in the same order on all ranks. A micro-batch without an image
    runs the vision tower on a dummy one, whose features are multiplied by zero; one without a post
    has a placeholder (see `data.collate`), of which the results are dropped.
    """
    inner = training_step.model.model

    def add_dummy_image(_, args, kwargs):
        # Only a prompt has these types; what follows on a cache, and inference, needs no image.
        if inner.training and "mm_token_type_ids" in kwargs and "pixel_values" not in kwargs:
            embeddings = inner.get_input_embeddings()(kwargs["input_ids"])
            embeddings = embeddings + zero_of_dummy_image(inner.visual, embeddings.device)
            return args, kwargs | {"input_ids": None, "inputs_embeds": embeddings}

    def drop_placeholder(_, args, results):
        if not len(args[0]):
            return tuple(None if result is None else result[:0].clone() for result in results)

    inner.register_forward_pre_hook(add_dummy_image, with_kwargs=True)
    training_step.register_forward_hook(drop_placeholder)


def zero_of_dummy_image(vision, device):
    """Zero, computed from all of the vision tower, so that its parameters get a gradient."""
    config, merge = vision.config, vision.config.spatial_merge_size
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    image, grid = torch.zeros(merge**2, values, device=device), torch.tensor([[1, merge, merge]])
    output = vision(image, grid_thw=grid, return_dict=True)
    features = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    return 0 * sum(feature.float().sum() for feature in features)


def parameters_and_buffers(module):
    """A module's parameters and buffers; a tied one is listed once."""
    return [*module.parameters(), *module.buffers()]


def shard(training_step, device):
    """FSDP2: each layer of the language model and of the vision tower alone, the rest together.

    All ranks get rank 0's parameters and buffers.
    """
    values = [tensor.detach() for tensor in parameters_and_buffers(training_step)]
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(compute_dtype(device), reduce_dtype=torch.float32)
    inner = training_step.model.model
    for layer in (*inner.visual.blocks, *inner.language_model.layers, training_step):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    with torch.no_grad():
        for tensor, value in zip(parameters_and_buffers(training_step), values, strict=True):
            value = value.to(device)
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, mesh, tensor.placements)
                tensor.to_local().copy_(value.to_local())
            else:
                torch.distributed.broadcast(value, 0)
                tensor.copy_(value)
