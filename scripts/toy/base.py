"""Makes the starting point of the miniature recipe from the toy world's train split: tokenizer, CLIP tower, language
model.

llm/     a small Llama and its tokenizer, trained on the world's language
tower/   the vision half of a small CLIP, trained to tell which caption belongs to which of many pictures and twins
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from scripts.toy.language import language
from scripts.toy.learning import learn
from scripts.toy.tower import FAMILY, contrastive, draw_families
from vica.loading import check_device
from vica.testing import train_tokenizer
from vica.toy.world import SIDE
from vica.utils.errors import ViCAError
from vica.utils.files import read_json, whole_folder
from vica.utils.program import DEFAULT, exit_status

WORDS, SAMPLE = 600, 20000  # tokens of the tokenizer, and texts to train it on
LAYERS, WIDTH, HEADS, INNER = 12, 192, 6, 512
POSITIONS = 2048
SCENES = 120000  # scenes whose sentences the language model reads
LENGTH = 512  # tokens in one training sequence of the language model
LEAST = {"tower_steps": 1, "language_steps": 1, "pictures": FAMILY, "batch": 1}
# the name in messages, and transformers' model_type
PARTS = {"tower": ("tower", "clip_vision_model"), "llm": ("language model", "llama")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.toy.base", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=tuple(PARTS), help="one of the two (default: what is not there)")
    parser.add_argument("--tower-steps", type=int, default=12500, metavar="N", help=DEFAULT)
    parser.add_argument("--language-steps", type=int, default=6000, metavar="N", help=DEFAULT)
    parser.add_argument(
        "--pictures", type=int, default=400000, metavar="N",
        help=f"that the tower learns from, 38 KB of memory each on the host and on the device {DEFAULT}",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=512, help=f"pictures a step; an eighth as many texts {DEFAULT}")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    return exit_status("scripts.toy.base", lambda: build(args))


def build(args) -> None:
    check_least(args, LEAST)
    device = check_device(args.device)
    wanted = [name for name in PARTS if args.only in (None, name)]
    missing = [name for name in wanted if not (args.out / name).exists()]
    for name in wanted:
        if name not in missing:
            print(f"{args.out / name} is there already", flush=True)
    if not missing:
        return
    # Draw first: it forks, which goes well with neither threads nor a GPU in use.
    drawn = draw_families(args.pictures // FAMILY, args.seed) if "tower" in missing else None
    texts = list(islice(language(SCENES, args.seed), None if "llm" in missing else SAMPLE))
    tokenizer = train_tokenizer(texts[:SAMPLE], WORDS)
    for name in missing:
        torch.manual_seed(args.seed)
        with whole_folder(args.out / name) as folder:
            if drawn is not None and name == "tower":
                make_tower(folder, tokenizer, drawn, args, device)
                drawn = None
            else:
                make_language_model(folder, tokenizer, texts, args, device)


def check_least(args, least: dict[str, int]) -> None:
    for name, smallest in least.items():
        if (given := getattr(args, name)) is not None and given < smallest:
            raise ViCAError(f"--{name.replace('_', '-')} is {given}; it must be {smallest} at least")


def check_part(folder: Path, name: str) -> Path:
    """Returns the folder after a check that this module made it."""
    words, model_type = PARTS[name]
    config = folder / "config.json"
    if not config.is_file() or read_json(config).get("model_type") != model_type:
        raise ViCAError(f"{folder} holds no {words}")
    return folder


def make_tower(
    folder: Path, tokenizer: PreTrainedTokenizerFast, drawn: tuple[torch.Tensor, list[str]], args, device
) -> None:
    pixels, captions = drawn
    clip = contrastive(tokenizer, pixels, captions, args.batch, args.tower_steps, device)
    clip.vision_model.config.architectures = ["CLIPVisionModel"]
    clip.vision_model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)


def make_language_model(folder: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str], args, device) -> None:
    language_model(tokenizer, texts, args, device).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def language_model(tokenizer: PreTrainedTokenizerFast, texts: list[str], args, device) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    ids = np.concatenate([[*text, 2] for text in tokenizer(texts).input_ids])
    sequences = torch.from_numpy(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)).to(device)

    def loss() -> torch.Tensor:
        some = sequences[torch.randint(len(sequences), (max(1, args.batch // 8),), device=device)]
        return model(input_ids=some, labels=some).loss

    return learn(model, loss, args.language_steps, 1e-3, "language model", device)


if __name__ == "__main__":
    sys.exit(main())
