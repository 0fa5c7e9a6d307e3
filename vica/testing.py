"""A random tiny model that builds in a second, complete with tower, tokenizer and processor."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .data.conversation import get_template
from .data.processor import ViCAProcessor
from .model.llava import ViCAForConditionalGeneration
from .plan.config import ViCAConfig

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
VOCABULARY = 400
# Enough of the test questions' language to give common words one token each; all other text falls back to bytes.
CORPUS = [
    "What is in the picture? What colour is the circle? How many squares are there? Is there a star?",
    "There is a red circle left of a blue square above a green triangle on a yellow ground. Yes. No.",
    "one two three four five red green blue yellow black white large small left right above below",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    prompt = get_template("vicuna_v1").render([("user", CORPUS[0])])
    return train_tokenizer([prompt, *CORPUS], VOCABULARY)


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with merges for the frequent parts of `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def build_config() -> ViCAConfig:
    """Returns a config with LLaVA-1.5's proportions (576 visual tokens an image), 8 layers of width 256."""
    return ViCAConfig(
        text_config=dict(
            hidden_size=256,
            num_hidden_layers=8,
            num_attention_heads=8,
            intermediate_size=688,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        vision_config=dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=336,
            patch_size=14,
            projection_dim=64,
        ),
        t2v_layers=[0, 3],
        freeze_prefix=True,
    )


def build(seed: int = 0) -> tuple[ViCAForConditionalGeneration, ViCAProcessor]:
    torch.manual_seed(seed)
    config = build_config()
    model = ViCAForConditionalGeneration(config).eval()
    with torch.no_grad():  # weights of a trained model's size, so that the picture really changes the answer
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "vision_tower" not in name:
                weight.normal_(0, 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5)
    return model, ViCAProcessor.from_config(config, build_tokenizer())


def save(folder: Path, seed: int = 0) -> Path:
    model, processor = build(seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
