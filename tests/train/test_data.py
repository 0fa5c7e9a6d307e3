"""Tests training data: samples, examples, batches, their order, and the report of skipped samples."""

import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tests.builders import tiny_model
from tests.spm import IMAGE
from tests.training import talk
from vica.cli.main import main
from vica.data.collate import Collator
from vica.data.grouping import LengthGroupedSampler
from vica.data.labels import IGNORE
from vica.data.processor import ViCAProcessor
from vica.data.samples import open_samples
from vica.data.skipped import Skipped
from vica.data.sources import SOURCES
from vica.data.training import Broken, Example, TrainingSet, TrainingStream, check_folder, shuffled
from vica.testing import save
from vica.utils.errors import ViCAError

ROOT = Path(__file__).parents[2]

# ---- samples ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Returns a folder with two pictures, and a file that is not a picture."""
    folder = tmp_path_factory.mktemp("images")
    for name, size in (("wide.png", (40, 20)), ("tall.png", (20, 40))):
        Image.linear_gradient("L").convert("RGB").resize(size).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "wide.png").read_bytes()[:60])
    return folder


RECORDS = [
    {"id": "two", "image": ["wide.png", "tall.png"], "conversations": talk("<image><image>\nWhich?", "The first.")},
    {"id": "text", "conversations": talk("How are you?", "Well – 日本.")},
    {"id": 7, "image": "tall.png", "conversations": talk("<image>\nWhat is it?", "A mat.")},
]


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_and_lines(tmp_path, suffix):
    path = write(tmp_path / f"data.{suffix}", RECORDS)
    samples = open_samples(path)
    assert len(samples) == 3 and [samples[i] for i in (2, 0, 1)] == [RECORDS[i] for i in (2, 0, 1)]
    assert list(samples.without_images()) == RECORDS
    joined = open_samples([path, path])
    assert list(joined) == RECORDS * 2 and joined.name(4) == samples.name(1)
    for index in (-1, 6):
        with pytest.raises(IndexError):
            joined[index]


@pytest.fixture
def tables(tmp_path, folder, monkeypatch):
    """Returns the same three records as parquet, and as a saved dataset with decoded images."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{**record, "id": str(record["id"]), "image": [], "extra": 1} for record in RECORDS]
    for row, names in zip(rows, (["wide.png", "tall.png"], [], ["tall.png"]), strict=True):
        row["image"] = [{"bytes": (folder / name).read_bytes(), "path": name} for name in names]
    lists = datasets.Dataset.from_list(rows).cast_column("image", datasets.List(datasets.Image()))
    lists.to_parquet(tmp_path / "lists [1].parquet")
    (tmp_path / "folder" / "data").mkdir(parents=True)
    for name, part in {"train-0": [0, 1], "train-1": [2], "test-0": [0]}.items():
        lists.select(part).to_parquet(tmp_path / "folder" / "data" / f"{name}.parquet")
    rows = [{**row, "image": row["image"][-1] if row["image"] else None} for row in rows[1:]]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_give_the_same_examples(tables, tmp_path, folder, processor, streaming):
    want = TrainingSet(open_samples(write(tmp_path / "a.json", RECORDS)), processor, folder)
    for name, first in (("lists [1].parquet", 0), ("saved", 1), ("folder", 0)):
        samples = open_samples(tables / name, streaming)
        if streaming:
            got = list(TrainingStream(samples, processor, buffer=0))
        else:
            got = TrainingSet(samples, processor)
            assert got.lengths == want.lengths[first:]
        assert len(got) == 3 - first
        for one, other in zip(got, [want[i] for i in range(first, 3)], strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("listed", [False, True])
def test_a_broken_embedded_image_breaks_its_sample_only(tmp_path, folder, processor, listed):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": (folder / name).read_bytes()} for name in ("broken.png", "tall.png")]
    rows = [{**RECORDS[2], "image": [image] if listed else image} for image in images]
    kind = datasets.List(datasets.Image()) if listed else datasets.Image()
    datasets.Dataset.from_list(rows).cast_column("image", kind).save_to_disk(tmp_path)
    data = TrainingSet(open_samples(tmp_path), processor)
    assert "cannot be read" in data[0].reason and len(data[1].pixel_values) == 1


def assert_same(one: Example, other: Example):
    assert isinstance(one, Example), one
    assert one.id == other.id
    assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
    assert len(one.pixel_values) == len(other.pixel_values)
    assert all(map(torch.equal, one.pixel_values, other.pixel_values))


def test_sources_that_cannot_be_opened(tmp_path):
    (tmp_path / "lines.json").write_text('{"id": 1}\n{"id": 2}\n')
    (tmp_path / "table.json").write_text('{"id": 1}')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "notes.txt").write_text("a")
    for name, complaint in {
        "liuhaotian/LLaVA": "no such file or folder \\(a data set of the hub is written hub:NAME\\)",
        "lines.json": "must be named .jsonl",
        "table.json": "must hold a list of records; it holds a dict",
        "empty.jsonl": "holds no record",
        "notes.txt": "is neither .json",
        ".": "is neither .json",
    }.items():
        with pytest.raises(ViCAError, match=complaint):
            open_samples(tmp_path / name)
    pytest.importorskip("datasets")
    for name in ("cut.parquet", "state.json"):
        (tmp_path / name).write_text("PAR1")
        with pytest.raises(ViCAError, match="cannot be opened"):
            open_samples(tmp_path if name == "state.json" else tmp_path / name)
    with pytest.raises(ViCAError, match="no training data"):
        open_samples([])


# ---- examples and batches ---------------------------------------------------------------------------------------


def test_examples(tmp_path, folder, processor):
    data = TrainingSet(open_samples(write(tmp_path / "a.jsonl", RECORDS)), processor, folder)
    assert [len(data[i].pixel_values) for i in range(3)] == [2, 0, 1] and data[2].id == "7"
    pixels = processor.process_images([folder / "wide.png", folder / "tall.png"])
    for got, want in zip(data[0].pixel_values, pixels, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, torch.from_numpy(want))
    assert data[0].input_ids.tolist().count(IMAGE) == 2 and data[0].input_ids.dtype == torch.int64
    assert data.lengths == [4, -6, 6]


def test_bad_data_is_broken_and_says_why(tmp_path, folder, processor):
    conversations = RECORDS[2]["conversations"]
    bad = {
        "no such file": {"image": "absent.png", "conversations": conversations},
        "cannot be read": {"image": "broken.png", "conversations": conversations},
        "1 <image> marks, but the record names 0": {"conversations": conversations},
        "1 <image> marks, but the record names 2": {"image": ["wide.png"] * 2, "conversations": conversations},
        "0 <image> marks, but the record names 1": {"image": "wide.png", "conversations": talk("a", "b")},
        "http:/example.org/a.png': no such file": {"image": "http://example.org/a.png", "conversations": conversations},
        "image of type int": {"image": 3, "conversations": conversations},
        "must be a JSON object with conversations, got {'id'": {},
        "got 3": 3,
        "conversations must be a list": {"conversations": None},
    }
    records = [{"id": reason, **record} if isinstance(record, dict) else record for reason, record in bad.items()]
    path = write(tmp_path / "bad.jsonl", records)
    with open(path, "a") as file:
        file.write('{"id": "cut off", "conver')
    data = TrainingSet(open_samples(path), processor, folder)
    got = [item for batch in DataLoader(data, 3, num_workers=2, collate_fn=list) for item in batch]
    for item, reason in zip(got, [*bad, """got '{"id": "cut off", "conver'"""], strict=True):
        assert isinstance(item, Broken) and reason in item.reason, item
    assert got[0].id == "no such file" and got[8].id == f"{path}, record 9"
    assert all(length != 0 for length in data.lengths)


def test_wrong_settings_raise(tmp_path, folder, processor, tokenizer):
    samples = open_samples(write(tmp_path / "a.json", RECORDS))
    with pytest.raises(ViCAError, match="--image-folder is 'nowhere': no such folder"):
        TrainingSet(samples, processor, "nowhere")
    with pytest.raises(ViCAError, match="unknown conversation template 'v9'"):
        TrainingSet(samples, processor, folder, template="v9")
    tokenizer.eos_token = "<s>"
    with pytest.raises(ViCAError, match="ends answers with </s>, which is not the tokenizer's eos"):
        TrainingSet(samples, ViCAProcessor(tokenizer=tokenizer), folder)


def test_batches(tmp_path, folder, processor):
    data = TrainingSet(open_samples(write(tmp_path / "a.json", RECORDS)), processor, folder)
    items, broken = [data[i] for i in range(3)], Broken("x", "why")
    batch = Collator(pad_id=5)([items[0], broken, items[1], items[2]])
    assert batch["sample_ids"] == ["two", "text", "7"] and batch["broken"] == [broken]
    assert torch.equal(batch["pixel_values"], torch.stack([*items[0].pixel_values, *items[2].pixel_values]))
    for row, item in enumerate(items):
        length = len(item.input_ids)
        assert torch.equal(batch["input_ids"][row, :length], item.input_ids)
        assert torch.equal(batch["labels"][row, :length], item.labels)
        assert (batch["input_ids"][row, length:] == 5).all() and (batch["labels"][row, length:] == IGNORE).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
    assert "pixel_values" not in Collator(0)([items[1]])


def test_a_batch_of_broken_samples_is_a_step_without_learning():
    batch = Collator(pad_id=5)([Broken("x", "why")] * 2)
    assert (batch["sample_ids"], len(batch["broken"])) == ([], 2)
    model = tiny_model()
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    loss = model(**inputs).loss
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_dealt_to_ranks_and_workers(tmp_path, processor, monkeypatch, workers):
    monkeypatch.setenv("WORLD_SIZE", "2")
    records = [{"id": i, "conversations": talk("a", "b")} for i in range(23)]
    stream = open_samples([write(tmp_path / "a.jsonl", records[:9]), write(tmp_path / "b.json", records[9:])], True)

    def epoch(number: int) -> list[list[str]]:
        shares = []
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            data = TrainingStream(stream, processor, buffer=4)
            data.set_epoch(number)
            shares.append([item.id for item in DataLoader(data, None, num_workers=workers)])
        return shares

    first = epoch(0)
    assert sorted(map(int, sum(first, []))) == list(range(23))
    assert abs(len(first[0]) - len(first[1])) <= 2 * max(workers, 1)
    assert epoch(0) == first and epoch(1) != first and first[0] != sorted(first[0], key=int)


def test_a_stream_of_one_file_feeds_one_worker(tables, processor):
    data = TrainingStream(open_samples(tables / "lists [1].parquet", True), processor, buffer=0, endless=True)
    loader = iter(DataLoader(data, 2, num_workers=3, collate_fn=list))
    assert [[item.id for item in next(loader)] for _ in range(3)] == [["two", "text"], ["7", "two"], ["text", "7"]]


def test_the_buffer_shuffles_its_items():
    order = list(shuffled(iter(range(200)), 20, Random(0)))
    assert sorted(order) == list(range(200)) and order[:100] != sorted(order[:100])
    assert all(item < place + 21 for place, item in enumerate(order)), "drawn no further ahead than the buffer"


# ---- order ------------------------------------------------------------------------------------------------------


LENGTHS = st.lists(st.integers(-400, 400).filter(bool), min_size=1, max_size=90)


@settings(max_examples=150)
@given(lengths=LENGTHS, batch=st.integers(1, 4), world=st.integers(1, 4), by_modality=st.booleans())
def test_grouping_gives_every_index_once(lengths, batch, world, by_modality):
    sampler = LengthGroupedSampler(lengths, batch, world, by_modality, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)
    assert order == list(LengthGroupedSampler(lengths, batch, world, by_modality, seed=3))
    if by_modality:
        images, size = sum(x > 0 for x in lengths), batch * world
        whole = images // size + (len(lengths) - images) // size
        for start in range(0, whole * size, size):
            assert len({lengths[i] > 0 for i in order[start : start + size]}) == 1


def test_grouping_by_length_and_over_ranks():
    dice = torch.Generator().manual_seed(0)
    lengths = (torch.randint(1, 2000, (4800,), generator=dice) * (torch.rand(4800, generator=dice) - 0.3).sign()).long()
    lengths = lengths.tolist()
    sampler = LengthGroupedSampler(lengths, batch_size=4, world_size=8)
    words = torch.tensor([x + 128 if x > 0 else -x for x in lengths], dtype=torch.float)
    megabatches = words[list(sampler)].view(-1, 32)
    assert (megabatches.amax(1) - megabatches.amin(1)).mean() < 0.1 * (words.max() - words.min())
    assert megabatches.mean(1)[1:].gt(megabatches.mean(1)[:-1]).float().mean() < 0.7, "megabatches are shuffled"
    sampler = LengthGroupedSampler(lengths, batch_size=4, world_size=8, by_modality=True)
    first = list(sampler)
    shares = words[first][: 100 * 32].view(-1, 8, 4).sum(2)
    chance = words[torch.randperm(4800, generator=dice)][: 100 * 32].view(-1, 8, 4).sum(2)
    assert (shares.amax(1) - shares.amin(1)).mean() < 0.3 * (chance.amax(1) - chance.amin(1)).mean()
    sampler.set_epoch(1)
    assert list(sampler) != first


# ---- what is left out -------------------------------------------------------------------------------------------


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_skipped_samples_are_reported_once_and_counted_over_ranks(tmp_path):
    file = tmp_path / "out" / "skipped.jsonl"
    ranks = [Skipped(file, 0.03, total=100) for _ in range(2)]
    ranks[0].add(Broken("a", "no such\nfile"))
    ranks[1].add(Broken("b", "bad"))
    ranks[1].add(Broken("a", "no such\nfile"))
    assert lines(file) == [{"id": "a", "reason": "no such\nfile"}, {"id": "b", "reason": "bad"}]
    resumed = Skipped(file, 0.03, total=100)
    assert resumed.count == 2
    resumed.add(Broken("b", "bad"))
    resumed.add(Broken("c", "bad"))
    with pytest.raises(ViCAError, match=r"4 of 100 samples are broken, more than the 3.00% allowed; .*last: d: worse"):
        ranks[0].add(Broken("d", "worse"))
    assert len(lines(file)) == 4
    with pytest.raises(ViCAError, match="is 3; it must be from 0 to 1"):
        Skipped(file, 3)


def test_samples_that_share_an_id_count_separately(tmp_path, folder, processor):
    """Counts each sample. In LLaVA's mixes an id is often the image's: all questions about a missing one would count as
    one."""
    records = [{**RECORDS[2], "image": "absent.png"}] * 3 + [RECORDS[1]] * 5
    data = TrainingSet(open_samples(write(tmp_path / "a.json", records)), processor, folder)
    skipped = Skipped(tmp_path / "skipped.jsonl", 0.25, total=len(data))
    for index in (0, 1, 0, 1):  # two epochs
        skipped.add(data[index])
    assert [line["record"][-8:] for line in lines(tmp_path / "skipped.jsonl")] == ["record 1", "record 2"]
    with pytest.raises(ViCAError, match="3 of 8 samples are broken"):
        Skipped(tmp_path / "skipped.jsonl", 0.25, total=len(data)).add(data[2])


def test_without_a_total_the_share_is_of_the_samples_seen(tmp_path):
    skipped = Skipped(tmp_path / "skipped.jsonl", 0.01)
    skipped.saw(999)
    for number in range(12):
        skipped.add(Broken(str(number), "bad"))
    skipped.saw(301)
    skipped.add(Broken("12", "bad"))
    with pytest.raises(ViCAError, match="14 of 1300 samples"):
        skipped.add(Broken("13", "bad"))


# ---- vica data check --------------------------------------------------------------------------------------------


def test_check(tmp_path, folder, capsys):
    good = write(tmp_path / "good.json", [*RECORDS, RECORDS[0]])
    assert main(["data", "check", str(good), "--image-folder", str(folder), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    for line in ("4, of which 0 are broken", "3 with 5 images, 1 text only", "turns         8", "3, 1 of them more"):
        assert line in out
    assert "positions" not in out
    save(tmp_path / "toy")
    bad = write(tmp_path / "bad.jsonl", [RECORDS[1], {**RECORDS[2], "id": "x", "image": "no.png"}])
    command = ["data", "check", str(good), str(bad), "--image-folder", str(folder), "--workers", "2"]
    assert main([*command, "--model", str(tmp_path / "toy"), "--report", str(tmp_path / "report")]) == 1
    captured = capsys.readouterr()
    assert "broken: x: image" in captured.out and "1 of 6 samples are broken" in captured.err
    assert [entry["id"] for entry in lines(tmp_path / "report")] == ["x"]
    positions = next(line for line in captured.out.splitlines() if line.startswith("positions"))
    longest = int(positions.rsplit(" ", 1)[1].replace(",", ""))
    assert 2 * 576 < longest < 2 * 576 + 120
    assert "too long      0 for --model-max-length 2,048" in captured.out
    assert main([*command, "--model", str(tmp_path / "toy"), "--model-max-length", "1000"]) == 1
    assert "too long      2 for --model-max-length 1,000" in capsys.readouterr().out


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Saved before a test captures stdout, which libraries that saving imports would keep to greet on."""
    return str(save(tmp_path_factory.mktemp("toy") / "model"))


def test_check_as_json(toy, tmp_path, folder, capsys):
    data = write(tmp_path / "data.json", [*RECORDS, RECORDS[0], {**RECORDS[2], "id": "x\ud800", "image": "no.png"}])
    command = ["data", "check", str(data), "--image-folder", str(folder), "--workers", "0", "--json"]
    assert main(command) == 1
    got = capsys.readouterr()
    told = json.loads(got.out)
    assert got.err.splitlines()[-1] == "vica data: 1 of 5 samples are broken"
    assert [broken["id"] for broken in told["broken"]] == ["x\ud800"] and "no.png" in told["broken"][0]["reason"]
    counts = dict(samples=5, with_image=3, images=5, text_only=1, turns=8, ids=4, ids_twice=1)
    assert {name: told[name] for name in counts} == counts and told["lengths"] is told["positions"] is None
    assert main([*command, "--model", toy, "--model-max-length", "1000"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["too_long"] == 2 and told["lengths"]["longest"] > 1000 and told["learned"] > 0


def test_check_finds_all_samples_that_training_would_skip(tmp_path, folder, capsys):
    """Uses an image that can be read but not padded to a square, and half a character, which cannot be printed."""
    Image.new("RGB", (20000, 1)).save(folder / "long.png")
    data = write(tmp_path / "a.json", [{**RECORDS[2], "id": "sur\ud800", "image": "long.png"}])
    save(tmp_path / "toy")
    command = ["data", "check", str(data), "--image-folder", str(folder), "--workers", "0"]
    assert main([*command, "--model", str(tmp_path / "toy")]) == 1
    assert "broken: sur\\ud800: an image of 20000x1 is too long to be padded" in capsys.readouterr().out


def test_missing_files_of_llava_are_named_with_where_they_come_from(tmp_path):
    """The scripts' default files and folders; others are only named."""
    with pytest.raises(ViCAError, match="hf download .* liuhaotian/LLaVA-Pretrain .* --local-dir .*/LLaVA-Pretrain"):
        open_samples(tmp_path / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json")
    with pytest.raises(ViCAError, match="LLaVA-Instruct-150K llava_v1_5_mix665k.json --local-dir"):
        open_samples(tmp_path / "llava_v1_5_mix665k.json")
    with pytest.raises(ViCAError, match="no such folder. LLaVA's images for stage 1: hf download .*images.zip"):
        check_folder(tmp_path / "LLaVA-Pretrain" / "images")
    with pytest.raises(ViCAError, match="NAME\\)$"):
        open_samples(tmp_path / "mine.json")
    skipped = Skipped(tmp_path / "skipped.jsonl", 0, 10)
    for folder, part in (("vg/VG_100K", "images.zip"), ("vg/VG_100K_2", "images2.zip")):
        reason = f"image '{tmp_path}/{folder}/1.jpg': no such file"
        with pytest.raises(
            ViCAError, match=f"no such file. Visual Genome's .*/{part} && unzip {part} -d {tmp_path}/vg"
        ):
            skipped.add(Broken("1", reason))
    (tmp_path / "vg" / "VG_100K").mkdir(parents=True)  # there, if without this image: the folder is not to be fetched
    with pytest.raises(ViCAError, match="VG_100K/1.jpg': no such file$"):
        skipped.add(Broken("1", f"image '{tmp_path}/vg/VG_100K/1.jpg': no such file"))


def test_scripts_expect_the_folders_that_messages_know():
    """A default of a script that is renamed must be renamed in `SOURCES` too."""
    scripts = "".join(path.read_text() for path in (ROOT / "scripts" / "v1_5").glob("*.sh"))
    defaults = set(re.findall(r"\$\{(?:DATA|IMAGES):-playground/data/([^}]+)\}", scripts))
    assert defaults and defaults <= SOURCES.keys()
    documented = (ROOT / "docs" / "data.md").read_text()
    assert all(end in documented for end in SOURCES)
