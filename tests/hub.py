"""The hub's datasets without the hub: rows in a parquet file, read by the datasets library itself."""

import io

import pytest
from PIL import Image


def picture(shade: int) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(held, "PNG")
    return held.getvalue()


def local_hub(monkeypatch, folder, held: dict[tuple[str, str | None, str], list[dict]]) -> None:
    """`held` has the rows by repository, config and split; bytes of an image, or a list of them, under "image"."""
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
        return [wrap(one) for one in image] if isinstance(image, list) else dict(bytes=image, path=None)

    return row | {"image": wrap(row["image"])} if "image" in row else row
