"""Replaces the hub's datasets: rows in a parquet file, read by the datasets library itself."""

import io

import pytest
from PIL import Image


def picture(shade: int) -> bytes:
    return png((shade, 0, 0))


def png(colour) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(held, "PNG")
    return held.getvalue()


def stand_in(monkeypatch, folder, rows: list[dict], repository: str, config: str | None, split: str) -> None:
    """Replaces one split of one dataset."""
    local_hub(monkeypatch, folder, {(repository, config, split): rows})


def local_hub(monkeypatch, folder, held: dict[tuple[str, str | None, str], list[dict]]) -> None:
    """Replaces several splits. `held` has the rows by repository, config and split; images are bytes, or lists of
    bytes, under "image"."""
    datasets = pytest.importorskip("datasets")
    load, kept = datasets.load_dataset, {}
    for number, (place, rows) in enumerate(held.items()):
        stored = datasets.Dataset.from_list([_stored(row) for row in rows])
        if "image" in rows[0]:
            kind = datasets.Image()
            stored = stored.cast_column("image", datasets.List(kind) if isinstance(rows[0]["image"], list) else kind)
        kept[place] = str(folder / f"{number}.parquet")
        stored.to_parquet(kept[place])

    def load_dataset(repository, config=None, split=None):
        path = kept[repository, config, split]
        return load("parquet", data_files=path, split="train", cache_dir=str(folder / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def _stored(row: dict) -> dict:
    def wrap(image):
        if isinstance(image, list):
            return [wrap(one) for one in image]
        return None if image is None else dict(bytes=image, path=None)

    return row | {"image": wrap(row["image"])} if "image" in row else row
