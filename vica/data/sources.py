"""Names where LLaVA's training data come from, for messages about what is missing. docs/data.md tells the same."""

import os
import re
from pathlib import PurePath

_HUB = "hf download --repo-type dataset liuhaotian/{}"
# The end of a path, and what makes it appear; {folder} is its beginning. Sizes are in docs/data.md.
SOURCES = {
    "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": (
        "LLaVA's captions for stage 1",
        _HUB.format("LLaVA-Pretrain blip_laion_cc_sbu_558k.json --local-dir {folder}/LLaVA-Pretrain"),
    ),
    "LLaVA-Pretrain/images": (
        "LLaVA's images for stage 1",
        _HUB.format("LLaVA-Pretrain images.zip --local-dir {folder}/LLaVA-Pretrain")
        + " && unzip {folder}/LLaVA-Pretrain/images.zip -d {folder}/LLaVA-Pretrain/images",
    ),
    "llava_v1_5_mix665k.json": (
        "LLaVA's instructions for stage 2",
        _HUB.format("LLaVA-Instruct-150K llava_v1_5_mix665k.json --local-dir {folder}"),
    ),
    "coco/train2017": (
        "COCO's training images",
        "wget http://images.cocodataset.org/zips/train2017.zip && unzip train2017.zip -d {folder}/coco",
    ),
    "gqa/images": (
        "GQA's images",
        "wget https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip && unzip images.zip -d {folder}/gqa",
    ),
    "ocr_vqa/images": (
        "OCR-VQA's images, all as .jpg",
        "the download script of https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_",
    ),
    "textvqa/train_images": (
        "TextVQA's images",
        "wget https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
        " && unzip train_val_images.zip -d {folder}/textvqa",
    ),
    "vg/VG_100K": (
        "Visual Genome's images, part 1",
        "wget https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip && unzip images.zip -d {folder}/vg",
    ),
    "vg/VG_100K_2": (
        "Visual Genome's images, part 2",
        "wget https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip && unzip images2.zip -d {folder}/vg",
    ),
}


def where_from(path: str | os.PathLike) -> str:
    """Return a sentence that says how to get `path`, a file or folder of LLaVA's data; empty for other paths."""
    path = PurePath(path)
    for end, (name, command) in SOURCES.items():
        if path.parts[-len(PurePath(end).parts) :] == PurePath(end).parts:
            folder = path.parents[len(PurePath(end).parts) - 1]
            return f". {name}: {command.format(folder=folder)} (docs/data.md)"
    return ""


def where_images_from(reason: str) -> str:
    """Return `where_from` for the folder of the image that `reason` names, where that folder is not there at all."""
    # A name that begins with dots is shortened: its folder cannot be looked at.
    named = re.search(r"image '(?!\.\.\.)(.+)': no such file", reason)
    folders = PurePath(named[1]).parents if named else ()
    return next((told for folder in folders if not os.path.isdir(folder) and (told := where_from(folder))), "")
