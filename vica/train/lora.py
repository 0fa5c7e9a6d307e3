"""Adds LoRA adapters to the language model, for training."""

from torch import nn

from ..checkpoint.adapters import peft


def add_adapters(model, args):
    """Returns the model with adapters on every linear map of the decoder's layers, as in LLaVA."""
    names = {name.rsplit(".", 1)[-1] for name, x in model.model.layers.named_modules() if isinstance(x, nn.Linear)}
    if args.bits < 16:
        model = peft().prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    layers = "|".join(sorted(names))
    config = peft().LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        target_modules=rf"model\.layers\..*\.({layers})",
        task_type="CAUSAL_LM",
    )
    return peft().get_peft_model(model, config)
