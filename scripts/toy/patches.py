"""Measures the information in a tower's patches about a thing in the picture: how often its shape, colour and size can
be read from the four patches in the middle of its place.

linear      by a linear map of the four
set         by a network that maps each by itself, averages, and maps again, as attention to frozen tokens can
together    by a network that sees the four at once, as a decoder can if they attend to one another
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from scripts.toy.base import check_least, check_part
from vica.loading import check_device
from vica.toy.world import COLOURS, SHAPES, SIDE, SIZES, Thing, draw, random_scene
from vica.utils.program import DEFAULT, exit_status, quiet_transformers
from vica.utils.progress import progress
from vica.utils.table import table

PATCH, LAYER = 14, -2  # LLaVA's layer
HIDDEN, STEPS, BATCH = 256, 600, 1024
SURE = 1e-3  # loss at which to stop: AdamW's moments would decay to denormal numbers, which are slow on CPUs
ASKED = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "size": tuple(SIZES)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.toy.patches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tower", type=Path, help="folder that scripts.toy.base made")
    parser.add_argument("--pictures", type=int, default=6000, metavar="N", help=f"to learn from {DEFAULT}")
    parser.add_argument("--device")
    quiet_transformers()
    return exit_status("scripts.toy.patches", lambda: run(parser.parse_args(argv)))


def run(args) -> None:
    check_least(args, {"pictures": 1})
    device = check_device(args.device)
    tower = CLIPVisionModel.from_pretrained(check_part(args.tower, "tower")).eval().to(device)
    learned, asked = (look(tower, f"{part} {args.pictures}", count) for part, count in (
        ("learned", args.pictures), ("asked", max(1, args.pictures // 6))
    ))  # fmt: skip
    print(table([("right, %", *NETWORKS), *(read(name, learned, asked) for name in ASKED)]))


def read(name: str, learned, asked) -> tuple[str, ...]:
    """Returns a row of the table."""
    (patches, things), (others, other_things) = learned, asked
    labels, wanted = (
        torch.tensor([ASKED[name].index(getattr(thing, name)) for thing in some], device=patches.device)
        for some in (things, other_things)
    )
    count = len(ASKED[name])
    return name, *(f"{right(make, patches, labels, others, wanted, count):.1f}" for make in NETWORKS.values())


def right(make, patches, labels, others, wanted, count: int) -> float:
    """Returns the percentage of `wanted`, [M], that a network trained on `patches`, [N, 4, width], and `labels` reads
    in `others`."""
    torch.manual_seed(0)
    mean, spread = patches.mean((0, 1)), patches.std((0, 1)) + 1e-6
    patches, others = (patches - mean) / spread, (others - mean) / spread
    network = make(patches.shape[-1], count).to(patches.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(STEPS):
        some = torch.randint(len(patches), (BATCH,), device=patches.device)
        optimizer.zero_grad()
        loss = cross_entropy(network(patches[some]), labels[some])
        if loss < SURE:
            break
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        return 100 * (network(others).argmax(1) == wanted).float().mean().item()


class Average(nn.Module):
    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return patches.mean(1)


NETWORKS = {
    "linear": lambda width, count: nn.Sequential(nn.Flatten(), nn.Linear(4 * width, count)),
    "set": lambda width, count: nn.Sequential(
        nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), Average(), nn.GELU(), nn.Linear(HIDDEN, count)
    ),
    "together": lambda width, count: nn.Sequential(
        nn.Flatten(), nn.Linear(4 * width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, count)
    ),
}


@torch.inference_mode()
def look(tower: CLIPVisionModel, seed: str, count: int) -> tuple[torch.Tensor, list[Thing]]:
    """Returns the four patches of each thing of `count` scenes, [things, 4, width], and the things."""
    rng, preprocess, patches, things = (
        random.Random(seed),
        CLIPImageProcessorPil(do_resize=False, do_center_crop=False),
        [],
        [],
    )
    scenes = [random_scene(rng) for _ in range(count)]
    starts = range(0, count, 256)
    for start in progress(starts, len(starts), "batches", f"looking, {seed.split()[0]}"):
        some = scenes[start : start + 256]
        pixels = preprocess([draw(scene) for scene in some], return_tensors="pt").pixel_values.to(tower.device)
        seen = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[LAYER][:, 1:].float()
        places = [(number, thing) for number, scene in enumerate(some) for thing in scene.things]
        patches += [seen[number, four(thing)] for number, thing in places]
        things += [thing for _, thing in places]
    return torch.stack(patches).clone(), things


def four(thing: Thing) -> list[int]:
    """Returns the patches whose middles are nearest to the middle of the thing's place."""
    across = SIDE // PATCH
    row, column = (min(int((place + 0.5) * SIDE / 3 / PATCH - 0.5), across - 2) for place in (thing.row, thing.column))
    return [across * y + x for y in (row, row + 1) for x in (column, column + 1)]


if __name__ == "__main__":
    sys.exit(main())
