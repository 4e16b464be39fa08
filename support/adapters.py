"""LoRA adapters, through the optional package peft."""

from support.console import reading

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MORE_THAN_LORA = ("modules_to_save", "target_parameters", "trainable_token_indices")
PREFIX = "base_model.model."  # of peft's weight names

# The linear layers that --lora adapts, by their names in the families' models.
LORA_TEXT = (
    r"model\.language_model\.layers\.\d+\."
    r"(self_attn|linear_attn|mlp|mlp\.shared_expert)\.(in_proj_\w+|\w+_proj)"
)
LORA_VISION = r"model\.visual\.blocks\.\d+\.(attn|mlp)\.(qkv|proj|\w+_proj|\w*fc\d)"


def need_peft():
    """Raises UserError where the optional package for adapters is missing."""
    with reading("the optional package for adapters (LoRA)", "pip install peft"):
        import peft  # noqa: F401


def adapter_config(model):
    """The peft configuration of a model's adapter, None where it has none."""
    return getattr(model, "peft_config", {}).get("default")


def add_adapter(model, rank, base, vision=False):
    """Freeze a model and add a LoRA adapter to every linear layer of its language model, in place.

    The adapter has rank `rank`, scale 2, B zero, and float32 weights; with `vision` the vision
    tower gets it, too. `base` is the name of the model that the adapter's folder will give.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        base_model_name_or_path=base,
        target_modules=f"{LORA_TEXT}|{LORA_VISION}" if vision else LORA_TEXT,
    )
    return inject_adapter(model, config)


def inject_adapter(model, config):
    """The model, frozen, with a new float32 adapter on it; in place."""
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def read_adapter(folder, model, weights=True):
    """The model with the adapter of a folder on it. Raises UserError if it does not fit."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    with reading(f"{folder}: its adapter", "is the copy whole, and its base the right one?"):
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = False
        model = inject_adapter(model, config)
        if weights:
            saved = load_file(folder / ADAPTER_WEIGHTS)
            saved = {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()}
            tied = model.config.tie_word_embeddings
            if tied and any("embed_tokens" in name or "lm_head" in name for name in saved):
                raise ValueError("it adapts lm_head or embed_tokens, which are tied: one tensor")
            report = set_peft_model_state_dict(model, saved)
            missing = [name for name in report.missing_keys if "lora_" in name]
            if wrong := [*missing, *report.unexpected_keys]:
                raise ValueError(f"a weight is missing or has no place in the base: {wrong[0]}")
    return model.eval()


def write_adapter(model, weights, folder):
    """Write a model's adapter in peft's layout; `weights` are its trained tensors by name."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter_config(model).save_pretrained(folder)
    named = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in named.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def merge_adapter(model):
    """Add an adapter to the weights that it adapts, and remove it; in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [*model.named_modules()]:
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
