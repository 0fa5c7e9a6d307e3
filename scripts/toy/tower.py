"""Trains the tower of the toy world: the vision half of a small CLIP, which learns which caption fits which picture.

A caption's similarity to a picture is the mean over its words of their similarity to the most similar patch. CLIP's own
loss compares one vector of the whole picture. A tower trained that way told nearly all twins apart, and yet its single
patches, which are all that a language model sees, said little about shapes.
"""

import random
from functools import partial

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from scripts.toy.learning import learn
from scripts.toy.twins import twins
from vica.toy.captions import caption
from vica.toy.cores import in_order
from vica.toy.world import SIDE, draw, random_scene

VISION = dict(hidden_size=192, intermediate_size=768, num_hidden_layers=8, num_attention_heads=6, projection_dim=128)
TEXT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, projection_dim=128)
TOKENS = 72  # longest caption in tokens
FAMILY = 4  # pictures that differ in one thing
GROUP = 16  # families that are compared with each other


def contrastive(
    tokenizer: PreTrainedTokenizerFast, pixels: torch.Tensor, captions: list[str], batch: int, steps: int, device
) -> CLIPModel:
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
    pixels, ids = pixels.to(device), ids.to(device)
    model = build(tokenizer).to(device)
    mean, std = (torch.tensor(getattr(CLIPImageProcessorPil(), f"image_{x}"), device=device) for x in ("mean", "std"))
    groups = max(1, batch // (FAMILY * GROUP))
    families = max(1, batch // FAMILY // groups)

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(pixels) // FAMILY, (groups, families, 1), device=device)
        some = (chosen * FAMILY + torch.arange(FAMILY, device=device)).flatten(1)
        seen = (pixels[some.flatten()].float() / 255 - mean[:, None, None]) / std[:, None, None]
        return pairing_loss(model.logit_scale.exp() * likeness(model, ids[some], seen, tokenizer.pad_token_id))

    return learn(model, loss, steps, 1e-3, "tower", device)


def build(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=tokenizer.pad_token_id)
    text = dict(TEXT, vocab_size=len(tokenizer), max_position_embeddings=TOKENS, **special)
    vision = dict(VISION, image_size=SIDE, patch_size=14)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def likeness(model: CLIPModel, ids: torch.Tensor, pixels: torch.Tensor, pad: int) -> torch.Tensor:
    """Returns similarities [groups, texts, pictures] of ids [groups, texts, T] and pixels [groups * pictures, 3, H,
    W]."""
    groups, texts, length = ids.shape
    patches = model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
    patches = normalize(model.visual_projection(model.vision_model.post_layernorm(patches)), dim=-1)
    words = model.text_model(input_ids=ids.flatten(0, 1)).last_hidden_state
    words = normalize(model.text_projection(words), dim=-1)
    count = patches.shape[1]
    alike = words.view(groups, texts * length, -1) @ patches.reshape(groups, texts * count, -1).mT
    best = alike.view(groups, texts, length, texts, count).amax(-1)
    read = (ids != pad)[..., None].to(best.dtype)
    return (best * read).sum(2) / read.sum(2)


def pairing_loss(scores: torch.Tensor) -> torch.Tensor:
    """Returns the loss of finding each text's picture among the pictures, and each picture's text among the texts."""
    own = torch.arange(scores.shape[-1], device=scores.device).expand(len(scores), -1)
    return (cross_entropy(scores, own) + cross_entropy(scores.mT, own)) / 2


def draw_families(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Returns pictures [count * FAMILY, 3, SIDE, SIDE] and their captions, with twins next to each other."""
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
