"""Datasets of the hub in small, on disk and without a network."""

from io import BytesIO

import pytest
from PIL import Image


def png(colour: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


def stand_in(monkeypatch, folder, rows: list[dict], *expected) -> None:
    """`rows`, whose images are bytes, become a parquet file that datasets.load_dataset gives to whoever asks for the
    `expected` repository, configuration and split."""
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    table = {name: [row[name] for row in rows] for name in rows[0]}
    table["image"] = [None if image is None else {"bytes": image, "path": None} for image in table["image"]]
    stored = datasets.Dataset.from_dict(table)
    stored.cast_column("image", datasets.Image()).to_parquet(folder / "rows.parquet")

    def given(repository, config, split):
        assert (repository, config, split) == expected
        return load("parquet", data_files=str(folder / "rows.parquet"), split="train", cache_dir=str(folder / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", given)
