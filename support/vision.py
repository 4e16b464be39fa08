"""The vision tower in a form that keeps a GPU busy: few calls of attention, nothing read back."""

from collections import Counter
from functools import lru_cache

import torch
from torch.nn.functional import scaled_dot_product_attention


def pack_images(model):
    """Let a model attend to all windows or images of one length at once; returns it.

    With sdpa, transformers calls attention for one window of one image after the other. Only a
    function whose name has "flash" in it gets all of them.
    """
    from transformers import AttentionInterface

    tower = model.model.visual
    if tower.config._attn_implementation == "sdpa":
        AttentionInterface.register("flash_by_length", attend_by_length)
        # Not by transformers' setter, which looks for a package of this name. It is never saved.
        tower.config._attn_implementation = "flash_by_length"
        tower.register_forward_pre_hook(plan_on_cpu, with_kwargs=True)
    return model


def plan_on_cpu(tower, args, kwargs):
    """Compute what follows from the images' sizes on the CPU: to read one would wait for a GPU."""
    from transformers import vision_utils

    grid, merge = kwargs["grid_thw"].cpu(), tower.spatial_merge_size
    on_cpu, planned = {"grid_thw": grid}, {}
    planned["position_ids"] = vision_utils.get_vision_position_ids(grid, merge)
    if hasattr(tower, "window_size"):  # Qwen2.5
        windows = vision_utils.get_vision_window_index(
            grid, merge, window_size=tower.window_size, patch_size=tower.patch_size
        )
        planned["window_index"], on_cpu["cu_window_seqlens"] = windows
    if hasattr(tower, "pos_embed"):  # Qwen3 and later
        names = "num_grid_per_side interpolation_mode interpolation_align_corners".split()
        table = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, *(getattr(tower, name) for name in names), merge
        )
        planned["interp_indices"], planned["interp_weights"] = table
    device = args[0].device
    planned = {name: x.to(device, non_blocking=True) for name, x in planned.items()}
    return args, kwargs | on_cpu | planned


def attend_by_length(module, query, key, value, *_, cu_seq_lens_q, scaling=None, **__):
    """Attention within each of the windows that lie one behind the other.

    query, key, value: (1, heads, N, size); cu_seq_lens_q: where each window begins, and N. Returns
    ((1, N, heads, size), None), as transformers has it.
    """
    windows, order, inverse = group_by_length(tuple(cu_seq_lens_q.tolist()), query.device)
    rows = [x.squeeze(0).transpose(0, 1).index_select(0, order) for x in (query, key, value)]
    sizes = [length * count for length, count in windows]
    outputs = []
    for window, *parts in zip(windows, *(x.split(sizes) for x in rows), strict=True):
        length, count = window
        parts = [x.unflatten(0, (count, length)).transpose(1, 2) for x in parts]
        output = scaled_dot_product_attention(*parts, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, inverse)[None], None


@lru_cache(maxsize=8)  # all blocks of a pass ask for the same few
def group_by_length(starts, device):
    """([(length, number of windows)], patches in the order of their windows' length, inverse)."""
    lengths = torch.tensor(starts).diff()
    order = lengths.repeat_interleave(lengths).argsort(stable=True)
    windows = sorted(Counter(lengths.tolist()).items())
    return windows, *(x.to(device, non_blocking=True) for x in (order, order.argsort()))
