"""Projectors from the tower's features to the language model's width. Module names are LLaVA's, so its weights fit."""

from torch import nn


def build_projector(kind: str, features: int, width: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(features, width)
    if kind == "identity":
        return nn.Identity()
    return nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
