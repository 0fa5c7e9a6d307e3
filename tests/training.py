"""The starting point of training, in small: a language model and a tower in transformers' own files, and short runs on
it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from vica.plan.formats import TOWER
from vica.testing import build_tokenizer
from vica.train.run import main

LAYERS = "[0, 2]"

# Names of the weights of `write_base` inside a whole model.
MAPS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
NORMS = ["input_layernorm", "post_attention_layernorm"]
PROJECTOR = {f"model.mm_projector.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")}
LANGUAGE = {f"model.layers.{i}.{name}.weight" for i in range(4) for name in MAPS + NORMS}
LANGUAGE |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
WRAPPED = "base_model.model."
ADAPTERS = {f"model.layers.{i}.{x}.lora_{ab}.default.weight" for i in range(4) for x in MAPS for ab in "AB"}


def talk(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def write_base(folder: Path, **changes) -> Path:
    """Writes a Llama of four layers with its tokenizer, and the tower beside it. `changes` are the language model's."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=3, **changes,
    )  # fmt: skip
    widened(LlamaForCausalLM(config)).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
        projection_dim=16,
    )  # fmt: skip
    widened(CLIPVisionModel(tower)).save_pretrained(folder / "tower")
    return folder


def widened(model):
    """Returns the model with larger weights: at the usual size of fresh ones an image hardly moves the output, and
    errors in it would go unseen."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "position" not in name:
                weight.normal_(0, 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5)
    return model


def arguments(root: Path, output: Path, stage: str | None = "finetune", **changes) -> list[str]:
    """Returns a short run's flags; `root` holds the base and the world. A change to None leaves the flag out."""
    flags = dict(
        stage=stage, version="plain" if stage == "pretrain" else "v1", model_name_or_path=root / "llm",
        vision_tower=root / "tower", t2v_layers=LAYERS, data_path=root / f"world/{stage or 'finetune'}.json",
        image_folder=root / "world/images", output_dir=output, per_device_train_batch_size=2, max_steps=2,
        learning_rate=1e-3, use_cpu=True, dataloader_num_workers=0, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    given = {name: str(value) for name, value in (flags | changes).items() if value is not None}
    return [text for name, value in given.items() for text in (f"--{name}", value)]


def trained(root: Path, output: Path, stage: str = "finetune", **flags) -> Path:
    """Runs a stage of training and returns its output folder."""
    assert main(arguments(root, output, stage, **flags)) == 0
    return output


def tower_weights(root: Path) -> dict[str, torch.Tensor]:
    """Returns the tower's weights under the names that they have in the whole model."""
    weights = load_file(root / "tower/model.safetensors")
    return {TOWER + name.removeprefix("vision_model."): x for name, x in weights.items()}


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
