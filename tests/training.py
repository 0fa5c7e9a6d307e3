"""What training starts from, in small: a language model and a tower in transformers' own files, and a toy world."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from vica.toy.model import build_tokenizer

LAYERS = "[0, 2]"


def write_base(folder: Path) -> Path:
    """A Llama of four layers with its tokenizer, and the tower beside it."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
        projection_dim=16,
    )  # fmt: skip
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    return folder
