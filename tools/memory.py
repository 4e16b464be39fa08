"""Estimate the GPU memory of a training step, for train.py's settings, from config.json alone.

    python -m tools.memory --model Qwen/Qwen2.5-VL-7B-Instruct --micro-batch 2 --gpus 8

All posts train their long answers: the worst case.

- weights, gradients, optimizer (AdamW): 4, 4 and 8 bytes a trained parameter; a frozen one takes 4
  (2 under LoRA in bf16). FSDP divides them by the number of GPUs.
- copies: autocast keeps a bf16 copy of each trained matrix until the backward ends. With
  checkpointing, the layers' copies are freed before the backward, which makes one layer's at a
  time. FSDP instead gathers two layers and what is outside of layers, in bf16; at the end of the
  backward it holds the latter with its gradients in bf16 and in float32 (8 bytes in all).
- activations: what the backward needs of each token in each layer.
- logits: (answer tokens, vocabulary) in float32, and a few rows more (`TokenLoss`) or all of them
  in bf16. Or, with all activations still there, the gradient of the logits in the computing type
  and that of a trained head in both types.

If a step is one micro-batch, gradients replace activations as these are freed. Layers with a
recurrent state (Qwen3.5) count as attention; without flash-linear-attention their activations take
three times as much. Not included: CUDA's own 0.5 GiB or so, what the allocator loses to fragments,
and generation.
"""

import math
import re
import sys
from collections import namedtuple
from pathlib import Path

from torch import nn

import train
from data import resolve_options
from evaluate import UserError, run
from model import TokenLoss, check_family, empty_model
from support.adapters import LORA_TEXT, LORA_VISION
from support.checkpoint import ENCODER_FILE, find_model
from support.console import positive_int, read_json
from support.images import MAX_PIXELS

SHAPES = Path(__file__).parent / "shapes.json"  # of published models
CARDS = (16, 24, 40, 80, 141)  # GiB of common GPUs
USABLE = 0.92  # share of it; CUDA itself and fragments take the rest

# ------------------------------------------------------------------------------------ the formula

Counts = namedtuple("Counts", "total trained matrices layer outside")


def estimate(model, args, card):
    """GiB that a step takes of each GPU of `card` GiB at its peak: {part: GiB, …, "peak": GiB}.

    The model may be on the device "meta".
    """
    rank, bf16 = args.lora, args.device != "cpu"
    count = count_parameters(model, rank, args.freeze_vision)
    frozen = (2 if bf16 and rank else 4) * (count.total - count.trained)
    large = args.parallel == "auto" and 16 * count.trained + frozen > card * 2**30 / 2
    shards = args.gpus if args.parallel == "fsdp" or large else 1
    posts = min(args.micro_batch, math.ceil(args.batch_size / args.gpus))
    kept, layer = activations(model.config, args, posts, shards > 1)

    text = model.config.text_config
    head = text.vocab_size * text.hidden_size
    cells = posts * args.lengths[1] * text.vocab_size
    losses = 4 * cells + max(2 * cells if bf16 else 0, 8 * min(cells, TokenLoss.AT_ONCE))
    head_gradient = 0 if rank else (6 if bf16 else 4) * head
    logits = max(losses, (2 if bf16 else 4) * cells + head_gradient)
    backward = max(logits, layer)  # a layer is recomputed when the logits are gone

    copies = 0
    if bf16 and shards > 1:
        copies = 2 * (count.outside + 2 * count.layer)
    elif bf16 and not rank:
        copies = 2 * count.matrices
        if args.gradient_checkpointing:  # at the backward's peak the head's and a layer's, or all
            copies = max(2 * (head + count.layer), copies + losses - backward)
    parts = {
        "weights": (4 * count.trained + frozen) / shards,
        "gradients": 4 * count.trained / shards,
        "optimizer": 8 * count.trained / shards,
        "copies": copies,
        "activations": kept + backward - logits,
        "logits": logits,
    }
    held, gradients = parts["weights"] + parts["optimizer"], parts["gradients"]
    work = copies + kept + backward
    several = args.batch_size > args.gpus * posts  # micro-batches
    peak = held + (gradients + work if several else max(gradients, work))
    if shards > 1 and not rank:
        peak = max(peak, held + gradients + (8 if bf16 else 12) * count.outside)
    return {part: size / 2**30 for part, size in (parts | {"peak": peak}).items()}


def activations(config, args, posts, sharded):
    """(bytes that the forward keeps for the backward, bytes of a layer that is recomputed).

    A layer keeps of a token two norms' inputs and normalised values; the inputs of the matrices
    (autocast casts one for each of five; a frozen matrix needs none, its adapter does); queries,
    keys, values and the attention's output; four inner values of the MLP. A vision block that is
    trained keeps the same of a patch. Answers that share a prompt keep its keys and values once
    more, repeated for each head, as transformers does where posts are padded. With checkpointing,
    a layer keeps only its input and recomputes the rest.
    """
    c, v = config.text_config, config.vision_config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries, keys = head * c.num_attention_heads, head * c.num_key_value_heads
    mlp = getattr(c, "intermediate_size", 0)
    if not mlp:  # experts: a token passes through some of them, and through the shared one
        mlp = c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size
    width = getattr(v, "embed_dim", None) or v.hidden_size
    vision_mlp = getattr(v, "intermediate_size", None) or int(width * v.mlp_ratio)

    bf16, rank, (text, answer) = args.device != "cpu", args.lora, args.lengths
    item = 2 if bf16 else 4
    stream = 2 if bf16 and (sharded or rank) else 4  # of hidden states: embeddings are not cast
    merge = v.spatial_merge_size**2  # patches of a token
    image = (args.max_pixels or MAX_PIXELS) // (v.patch_size**2 * merge)
    prompt, patches = image + text, posts * image * merge
    tokens, trained = posts * (prompt + answer), 0 if args.freeze_vision else patches

    norms = (18 if rank else 16 if sharded else 26) if bf16 else (16 if rank else 24)
    token = norms * c.hidden_size + 4 * item * (queries + mlp)
    if rank:
        token += 7 * item * rank + (2 * queries if bf16 else 0)
    patch = (32 if bf16 else 52) * width + 4 * item * vision_mlp
    pixels = v.in_channels * v.temporal_patch_size * v.patch_size**2
    ends = patches * pixels * (6 if bf16 and trained else 4)  # the input, the last norm, the merger
    ends += tokens * 3 * stream * c.hidden_size + trained * 5 * item * width
    cells = (prompt + answer) ** 2  # of a post's attention
    if args.gradient_checkpointing:
        inputs = c.num_hidden_layers * tokens * stream * c.hidden_size
        inputs += v.depth * trained * item * width
        layer = tokens * (token + 2 * item * mlp) + item * posts * cells
        return ends + inputs, max(layer, trained * (patch + 2 * item * vision_mlp))
    cached = 0
    if train.MODES[args.mode].shares_prompt:
        cells -= prompt * answer  # the prompt does not see the answer's columns
        cached = keys * (2 * stream if rank or sharded else 4 + item) + 2 * item * queries
    layer = tokens * token + posts * (item * cells + prompt * cached)
    return ends + c.num_hidden_layers * layer + v.depth * trained * patch, 0


def count_parameters(model, rank=None, freeze_vision=False):
    """Numbers of a model's parameters, an adapter's included, as Counts.

    matrices: trained, without LoRA, in products; layer: in the largest layer; outside: in none.
    """
    adapter, pattern = 0, LORA_TEXT if freeze_vision else f"{LORA_TEXT}|{LORA_VISION}"
    for name, layer in model.named_modules() if rank else ():
        if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name):
            adapter += rank * (layer.in_features + layer.out_features)
    blocks = (*model.model.visual.blocks, *model.model.language_model.layers)
    layers = [sum(p.numel() for p in block.parameters()) for block in blocks]
    size = sum(p.numel() for p in model.parameters())
    kept = [p for name, p in model.named_parameters() if not (freeze_vision and "visual" in name)]
    matrices = sum(p.numel() for p in kept if p.ndim > 1)
    if not model.config.tie_word_embeddings:  # the input embeddings are looked up only
        matrices -= model.get_input_embeddings().weight.numel()
    trained = adapter or sum(p.numel() for p in kept)
    return Counts(size + adapter, trained, matrices, max(layers), size - sum(layers))


# ------------------------------------------------------------------------------- the command line


def read_model(name):
    """(a model on the device "meta", its folder): without weights, and where possible offline.

    The folder is None for a published model whose shape is in shapes.json. Raises UserError.
    """
    from transformers import AutoConfig

    known = read_json(SHAPES)["models"]
    if name in known:
        return empty_model(AutoConfig.for_model(**known[name]), device="meta"), None
    folder = find_model(name, ["config.json", ENCODER_FILE])
    check_family(folder)
    return empty_model(folder, device="meta"), folder


def parse_args(arguments=None):
    parser = train.make_parser()
    parser.description, parser.epilog = __doc__, None
    parser.add_argument("--gpus", type=positive_int, default=1, help="number of GPUs")
    lengths = {"nargs": 2, "type": positive_int, "default": [160, 160]}
    lengths["help"] = "tokens of the longest prompt without its image, and of the longest answer"
    parser.add_argument("--lengths", metavar=("PROMPT", "ANSWER"), **lengths)
    arguments = sys.argv[1:] if arguments is None else arguments
    # A --train, though nothing reads it: without one, the defaults are those of the toy model.
    return train.parse_args(["--train", "", *arguments], parser)


def main():
    args = parse_args()
    if args.model is None:
        raise UserError("--model is missing: a folder or hub name, whose config.json is read")
    model, folder = read_model(args.model)
    if folder:
        resolve_options(args, folder)
    count = count_parameters(model, args.lora, args.freeze_vision)
    total, trained = (f"{number / 1e9:.3f} billion" for number in (count.total, count.trained))
    print(f"{args.model}: {total} parameters, {trained} of them trained")
    print(f"Estimated GiB of each of {args.gpus} GPUs, by the size of the GPUs:\n")
    print(f"{'':<12}", *(f"{card:>8}" for card in CARDS))
    needs = [estimate(model, args, card) for card in CARDS]
    for part in needs[0]:
        print(f"{part:<12}", *(f"{need[part]:8.2f}" for need in needs))
    fits = [need["peak"] <= USABLE * card for need, card in zip(needs, CARDS, strict=True)]
    print(f"{'fits':<12}", *(f"{'yes' if fit else 'no':>8}" for fit in fits))
    if "linear_attention" in (getattr(model.config.text_config, "layer_types", None) or []):
        print("\nIts recurrent layers take three times as much without flash-linear-attention")


if __name__ == "__main__":
    run(main)
