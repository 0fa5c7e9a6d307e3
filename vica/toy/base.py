"""What the miniature recipe starts from, made of the toy world's train split: tokenizer, CLIP tower and language model.

llm/     a small Llama and its tokenizer, trained on the world's language
tower/   the vision half of a small CLIP, trained to tell which caption belongs to which of many pictures and twins
"""

import argparse
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..errors import ViCAError
from ..files import whole_folder
from ..loading import check_device
from .captions import caption
from .cores import in_order
from .language import language
from .model import train_tokenizer
from .twins import twins
from .world import SIDE, draw, random_scene

WORDS = 600  # of the tokenizer
LAYERS, WIDTH, HEADS, INNER = 12, 192, 6, 512
TOWER = dict(hidden_size=192, intermediate_size=768, num_hidden_layers=8, num_attention_heads=6, projection_dim=128)
CAPTION = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, projection_dim=128)
POSITIONS = 2048
CAPTION_TOKENS = 72
SCENES = 60000  # whose sentences the language model reads
ROW = 512  # tokens of text that it sees at once
FAMILY = 4  # pictures that differ in one thing
LEAST = {"tower_steps": 1, "language_steps": 1, "pictures": FAMILY, "batch": 1}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vica.toy.base", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("tower", "llm"), help="one of the two (default: what is not there)")
    parser.add_argument("--tower-steps", type=int, default=12000, metavar="N")
    parser.add_argument("--language-steps", type=int, default=6000, metavar="N")
    parser.add_argument("--pictures", type=int, default=400000, metavar="N", help="that the tower learns from")
    parser.add_argument("--batch", type=int, default=512, help="pictures a step; an eighth as many texts")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        build(args)
    except (ViCAError, OSError) as error:
        print(f"vica.toy.base: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def build(args) -> None:
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise ViCAError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {least} at least")
    device = check_device(args.device)
    missing = [name for name in ("tower", "llm") if args.only in (None, name) and not (args.out / name).exists()]
    # First of all, as it is done by forks, which like neither threads nor a GPU in use.
    drawn = draw_families(args.pictures // FAMILY, args.seed) if "tower" in missing else None
    texts = list(language(SCENES, args.seed))
    tokenizer = train_tokenizer(texts[:20000], WORDS)
    for name in missing:
        torch.manual_seed(args.seed)
        with whole_folder(args.out / name) as folder:
            if name == "tower":
                make_tower(folder, tokenizer, drawn, args, device)
            else:
                make_language_model(folder, tokenizer, texts, args, device)


def make_tower(folder: Path, tokenizer: PreTrainedTokenizerFast, drawn, args, device) -> None:
    clip = contrastive(tokenizer, *drawn, args, device)
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
    ids = np.concatenate([[*row, 2] for row in tokenizer(texts).input_ids])
    rows = torch.from_numpy(ids[: len(ids) // ROW * ROW].reshape(-1, ROW)).to(device)

    def loss() -> torch.Tensor:
        some = rows[torch.randint(len(rows), (max(1, args.batch // 8),), device=device)]
        return model(input_ids=some, labels=some).loss

    return learn(model, loss, args.language_steps, 1e-3, "language model", device)


def contrastive(
    tokenizer: PreTrainedTokenizerFast, pixels: torch.Tensor, captions: list[str], args, device
) -> CLIPModel:
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=CAPTION_TOKENS, return_tensors="pt")
    pixels, texts = pixels.to(device), ids.input_ids.to(device)
    # A caption is read at its first pad token: with eos 2, transformers would read it at its largest id.
    tokens = dict(vocab_size=len(tokenizer), max_position_embeddings=CAPTION_TOKENS, bos_token_id=1, eos_token_id=3,
                  pad_token_id=3)  # fmt: skip
    tower = dict(TOWER, image_size=SIDE, patch_size=14)
    config = CLIPConfig(text_config=dict(CAPTION, **tokens), vision_config=tower, projection_dim=128)
    model = CLIPModel(config).to(device)
    mean, std = (torch.tensor(getattr(CLIPImageProcessorPil(), f"image_{x}"), device=device) for x in ("mean", "std"))

    def loss() -> torch.Tensor:
        families = torch.randint(len(pixels) // FAMILY, (max(1, args.batch // FAMILY), 1), device=device)
        some = (families * FAMILY + torch.arange(FAMILY, device=device)).flatten()
        seen = (pixels[some].float() / 255 - mean[:, None, None]) / std[:, None, None]
        return model(input_ids=texts[some], pixel_values=seen, return_loss=True).loss

    return learn(model, loss, args.tower_steps, 1e-3, "tower", device)


def draw_families(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Pictures [count * FAMILY, 3, SIDE, SIDE] and their captions, twins beside each other."""
    pixels, captions = np.empty((count, FAMILY, 3, SIDE, SIDE), np.uint8), []
    for place, (pictures, told) in enumerate(in_order(partial(draw_family, seed), count, "drawing", "families")):
        pixels[place] = pictures
        captions += told
    return torch.from_numpy(pixels).flatten(0, 1), captions


def draw_family(seed: int, index: int) -> tuple[np.ndarray, list[str]]:
    rng = random.Random(f"{seed} family {index}")
    family = twins(random_scene(rng), FAMILY - 1, rng)
    pictures = np.stack([np.asarray(draw(scene)).transpose(2, 0, 1) for scene in family])
    return pictures, [caption(scene, rng) + "</s>" for scene in family]


def learn(model, loss, steps: int, rate: float, name: str, device):
    """AdamW with a short rise of the rate and a cosine's fall. On CUDA a step is captured once: models so small would
    wait for their kernels' launches."""
    captured = device.type == "cuda"
    rates = torch.tensor(rate, device=device)
    settings = dict(lr=rates, capturable=True) if captured else dict(lr=rate)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, **settings)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=captured, cache_enabled=False):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.detach()

    model.train()
    run = capture(step) if captured else step
    with tqdm(range(steps), desc=name, disable=None) as bar:
        for done in bar:
            now = rate * min((done + 1) / max(1, steps // 20), 0.5 * (1 + np.cos(np.pi * done / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rates.fill_(now) if captured else now
            value = run()
            if done % 100 == 0 or done == steps - 1:
                bar.set_postfix(loss=f"{value.item():.3f}")
    print(f"{name}: loss {value.item():.3f} after {steps} steps", flush=True)
    return model.eval().cpu()


def capture(step):
    """`step` as a CUDA graph, after some ordinary ones."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()

    def run() -> torch.Tensor:
        graph.replay()
        return value

    return run


if __name__ == "__main__":
    sys.exit(main())
