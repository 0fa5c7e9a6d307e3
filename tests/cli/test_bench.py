"""Tests `vica bench`: formulas against torch's counter, columns that do what they claim, and complete reports."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.builders import Row, batch, image, tiny_config, tiny_model, tiny_vision
from vica.bench import throughput
from vica.bench.clock import Job, race
from vica.bench.columns import Columns
from vica.bench.drive import Drive
from vica.bench.inputs import Prompts, Shape
from vica.bench.models import SHAPES, Models, preset_config, random_model
from vica.bench.peers import Transformers
from vica.bench.report import origin
from vica.bench.training import Mix, Ours, Peer, make_batches
from vica.cli.main import main
from vica.engine.runner import Runner
from vica.model.llava import ViCAForConditionalGeneration
from vica.plan.flops import LayerFlops, dense, prefill_flops, sample_flops, visual_flops
from vica.testing import save
from vica.train.stages import part_of

CPU = torch.device("cpu")


def bench(capsys, *arguments: str, status: int = 0) -> tuple[str, dict]:
    """Returns the output of `vica bench`, and its last line as JSON."""
    assert main(["bench", *arguments, "--device", "cpu"]) == status
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def small_models(**changes) -> Models:
    """Returns a small random model with a tower, 16 visual tokens an image."""
    config = tiny_config(vision_config=tiny_vision(), freeze_prefix=True, **changes)
    return Models(random_model(config, CPU, torch.float32), None)


def columns_of(models: Models, p: Prompts, steps: int = 3) -> Columns:
    limits = dict(max_batch=p.batch, kv_bytes=2**20, image_memory_bytes=2**20)
    return Columns(models, lambda variant: limits, steps, compile_batch=[])


# --- formulas -----------------------------------------------------------------------------------------------------


def counted_by_torch(work) -> dict[str, int]:
    """Returns the FLOPs of linear maps and of batched products, of which eager attention consists."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    counts = {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}
    return dict(linear=counts.get("aten.mm", 0) + counts.get("aten.addmm", 0), batched=counts.get("aten.bmm", 0))


@pytest.mark.parametrize("layers, frozen", [([], True), ([0, 2], True), ([0, 2], False), ([0, 1, 2, 3], 2)], ids=str)
@pytest.mark.parametrize("variant", ["accel", "dense"])
def test_flops_of_linear_maps(variant, layers, frozen):
    model = tiny_model(variant=variant, t2v_layers=layers, freeze_prefix=frozen)
    for prefix, visual, text in ((6, 20, 5), (0, 20, 5), (3, 0, 4)):
        inputs = batch([Row((prefix, *([image(visual)] if visual else []), text))])
        measured = counted_by_torch(lambda: model(**inputs, logits_to_keep=1))  # noqa: B023
        assert prefill_flops(model.config, prefix, visual, text).linear == measured["linear"]


@pytest.mark.parametrize("layers, frozen", [([], True), ([0, 2], True), ([1], False), ([0, 1, 2, 3], 2)], ids=str)
@pytest.mark.parametrize("variant", ["accel", "dense"])
def test_flops_of_attention(variant, layers, frozen):
    """Eager attention computes whole rectangles. With a prefix and a text of one token each, accel's have no masked
    entry, and dense's mask all entries above the diagonal."""
    model = tiny_model(variant=variant, t2v_layers=layers, freeze_prefix=frozen)
    model.model.kernel_name = "eager"
    visual, text_config = 20, model.config.text_config
    each = 4 * text_config.num_attention_heads * text_config.head_dim
    masked = each * (visual + 1) * (visual + 2) // 2 * text_config.num_hidden_layers if variant == "dense" else 0
    inputs = batch([Row((1, image(visual), 1))])
    measured = counted_by_torch(lambda: model(**inputs))["batched"]
    rotary = counted_by_torch(lambda: model.model.rotary(torch.arange(visual + 2), torch.float32))["batched"]
    assert measured - rotary - masked == prefill_flops(model.config, 1, visual, 1).attention > 0


@pytest.mark.parametrize("variant", ["accel", "dense"])
def test_flops_of_a_training_sample(variant):
    """Counts the linear maps of every token, and the vocabulary's for the labelled ones."""
    model = tiny_model(variant=variant, t2v_layers=[0, 2], freeze_prefix=False)
    inputs = batch([Row((image(20), 9))])
    labels = inputs["input_ids"].clone()
    labels[:, :6] = -100  # the placeholder is column 0
    measured = counted_by_torch(lambda: model(**inputs, labels=labels, skip_logits=True))
    attention = sample_flops(model.config, 9, 20, 0) - linear_alone(model.config, 9, 20)
    assert sample_flops(model.config, 9, 20, 4) - attention == measured["linear"]
    assert attention == prefill_flops(model.config, 0, 20, 9).attention > 0


def linear_alone(config, text: int, visual: int) -> int:
    found = prefill_flops(config, 0, visual, text)
    return found.linear - 2 * config.text_config.hidden_size * config.text_config.vocab_size


def test_attention_of_several_tokens_by_hand():
    """Prefix of 2, 3 visual, text of 2: the pairs of layer 0, which sees the image, and of the three layers that do
    not."""
    config = tiny_config(t2v_layers=[0], freeze_prefix=False)
    pairs = (1 + 2) + (2 + 3 + 1) + (2 + 3 + 2) + 3 * ((1 + 2) + (2 + 1) + (2 + 2))
    assert prefill_flops(config, 2, 3, 2).attention == 4 * 32 * pairs


def test_flops_with_kept_prefix_and_image():
    """A kept prefix costs as much as the second call of a conversation; a kept image saves all but the attention to
    it."""
    model = tiny_model(freeze_prefix=False)
    with torch.no_grad():
        cache = model(**batch([Row((6,))]), use_cache=True).past_key_values
    inputs = batch([Row((image(20), 5))])
    del inputs["attention_mask"]
    measured = counted_by_torch(lambda: model(**inputs, past_key_values=cache, logits_to_keep=1))
    kept = prefill_flops(model.config, 6, 20, 5, prefix_kept=True)
    assert measured["linear"] == kept.linear
    both = prefill_flops(model.config, 6, 20, 5, prefix_kept=True, image_kept=True)
    assert kept.linear - both.linear == visual_flops(model.config, 20) and kept.attention == both.attention


def test_counted_flops_of_7b(capsys):
    out, found = bench(capsys, "flops", "--preset", "7b")
    cells = {(c["way"], c["visual"]): c for c in found["cells"]}
    assert 0.039 < cells["accel, nothing kept", 576]["visual_flops"] / cells["dense", 576]["visual_flops"] < 0.043
    assert cells["dense", 576]["flops"] == pytest.approx(2 * 6.48e9 * 636, rel=0.03), "two a weight and token"
    assert "4.1%" in out and {v for _, v in cells} == {576, 1152, 2880}
    assert found["t2v_layers"] == [0, 1, 7, 8, 9, 10, 11, 14] and found["commit"]


@pytest.mark.parametrize("preset, billions", [("3b", 2.7), ("7b", 6.74), ("13b", 13.0)])
def test_presets_are_the_published_models(preset, billions):
    config = preset_config(preset)
    text, layer = config.text_config, LayerFlops.of(config)
    weights = text.num_hidden_layers * layer.whole / 2 + 2 * text.hidden_size * text.vocab_size
    assert weights == pytest.approx(billions * 1e9, rel=0.01)
    assert config.vision_config.num_hidden_layers == 24 and set(SHAPES) == {"3b", "7b", "13b"}


# --- columns ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    return small_models()


@pytest.fixture
def prompts(models):
    return Prompts(models.config, 3, Shape(5, 16, 4, answer=4), CPU, torch.float32)


def test_peers_share_the_weights(models, prompts):
    columns_of(models, prompts).drive("accel")  # the engine fuses the weights
    theirs = dict(models.transformers.model.named_parameters())
    q = models.accel.model.layers[1].self_attn.q_proj.weight
    assert theirs["model.language_model.layers.1.self_attn.q_proj.weight"].data_ptr() == q.data_ptr()
    for variant in ("mask", "dense"):
        assert models.wired(variant).model.layers[1].self_attn.q_proj.weight.data_ptr() == q.data_ptr()
    assert models.transformers.language.config._attn_implementation == "sdpa"


def test_random_models_have_all_buffers(models, prompts):
    """Buffers that the meta device empties are filled again: a model built in the usual way sees the same."""
    usual = ViCAForConditionalGeneration(models.config)
    usual.load_state_dict(models.weights)
    want = usual.eval().get_image_features(prompts.pixels)
    for got in (models.accel.get_image_features(prompts.pixels), models.transformers.features(prompts.pixels)):
        torch.testing.assert_close(torch.stack(list(got)), want)


def test_columns_answer_alike(models, prompts):
    """All dense columns give the same first and last tokens, and so do all of accel's."""
    columns = columns_of(models, prompts)
    families = {"transformers": "dense", "dense": "dense"}
    for phase in ("prefill", "first", "decode"):
        makers = columns.jobs(phase, prompts)
        makers = {name: make for name, make in makers.items() if name not in ("text", "static")}
        answers = {name: t.tokens for name, t in race(makers, 1, CPU).items()}
        assert len(makers) >= 5 and all(len(tokens) == 3 for tokens in answers.values())
        for family in ("dense", "accel"):
            assert len({tuple(t) for n, t in answers.items() if families.get(n, "accel") == family}) == 1, answers


def test_kept_parts_are_not_computed(models, prompts, monkeypatch):
    columns, seen = columns_of(models, prompts), []
    image_kv, prefill = Runner.image_kv, Runner.prefill
    monkeypatch.setattr(Runner, "image_kv", lambda *a: seen.append(("images", len(a[1]))) or image_kv(*a))
    monkeypatch.setattr(Runner, "prefill", lambda *a: seen.append(("held", *(r.shared for r in a[1]))) or prefill(*a))
    work = {}
    for column in ("nothing", "prefix", "image"):
        job = columns.jobs("prefill", prompts)[column]()
        seen.clear()
        job.work(None)
        work[column] = list(seen)
    assert work == {
        "nothing": [("images", 3), ("held", 0, 0, 0)],
        "prefix": [("images", 3), ("held", 5, 5, 5)],
        "image": [("held", 5, 5, 5)],
    }


def test_slots_are_returned(models, prompts):
    drive = columns_of(models, prompts).drive("dense")
    pool = drive.runner.pool
    drive.admit(prompts, prefix_kept=True)
    assert pool.size - pool.free == 5 + 3 * (5 + 16 + 4 + 3)
    drive.clear()
    assert pool.free == pool.size


def test_too_many_tokens_are_out_of_memory(models, prompts):
    drive = Drive(models.engine("dense", max_batch=3, kv_bytes=2**12))
    found = race({"dense": lambda: Job(lambda _: None, lambda: drive.admit(prompts, False))}, 1, CPU)["dense"]
    assert found.failure == "out of memory" and found.median is None


# --- verbs --------------------------------------------------------------------------------------------------------


def test_latency(capsys, tmp_path):
    plot, file = tmp_path / "times.png", tmp_path / "times.json"
    out, found = bench(
        capsys, "latency", "--preset", "toy", "--phases", "tower", "visual", "generate", "--batch", "1",
        "--visual", "16", "64", "--steps", "2", "--repeats", "1", "--plot", str(plot), "--json", str(file),
        "--commit", "abc",
    )  # fmt: skip
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and plot.stat().st_size > 10_000
    assert json.loads(file.read_text()) == found
    assert {"hardware", "torch", "transformers", "python", "command", "copy_bytes_per_s", "decoder_bytes"} < set(found)
    assert found["commit"] == "abc" and found["dtype"] == "float32" and found["random_weights"]
    cells = {(c["phase"], c["visual"], c["column"]): c for c in found["cells"]}
    assert {n for _, v, n in cells if v == 64} == set("transformers text mask dense accel nothing prefix image".split())
    assert all(c["ms"] > 0 and not c["failure"] for c in cells.values() if c["phase"] != "generate")
    assert {c["as_referee"] for c in found["cells"] if "as_referee" in c} == {1.0}
    assert "ours, accel, engine, prefix and image kept" in out and "floor, prefix kept" in out
    assert ("generate", 576, "prefix") in cells and "measured ceilings" in out


def test_throughput(capsys, monkeypatch):
    encoded, encode = [], Runner.encode
    monkeypatch.setattr(Runner, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    out, found = bench(
        capsys, "throughput", "--preset", "toy", "--questions", "6", "--images", "2", "--peer-questions", "1",
        "--peer-batch", "2", "3", "--answer", "2",
        "--columns", "transformers", "batched", "prefix", "image",
    )  # fmt: skip
    cells = found["cells"]
    assert [(c["column"], c["batch"]) for c in cells[:3]] == [("transformers", 1), ("batched", 2), ("batched", 3)]
    assert [c["questions"] for c in cells] == [2, 4, 6, 6, 6], "two batches at least"
    assert all(c["questions_per_s"] == pytest.approx(c["questions"] / c["seconds"][0]) for c in cells)
    assert "best batch" in out and "prepared pixels" in out and found["images"] == 2
    assert sum(encoded) == 2 * 2 * 2, "each run of both engines meets each picture for the first time, and once"


@pytest.mark.slow
def test_training(capsys):
    """Every column takes the same steps: as many samples, and the same loss if it computes the same function."""
    out, found = bench(capsys, "train", "--preset", "toy", "--samples", "2", "--batch", "2", "2", "--repeats", "1")
    cells = {(c["stage"], c["column"]): c for c in found["cells"]}
    assert len(cells) == 10 and all(c["samples"] == 2 and not c["failure"] for c in cells.values())
    for stage in ("pretrain", "finetune"):
        loss = {column: cells[stage, column]["losses"] for _, column in cells}
        assert loss["accel"] == pytest.approx(loss["mask"], rel=1e-5)
        assert loss["accel"] == pytest.approx(loss["stored"], rel=1e-5)
        assert loss["dense"] == pytest.approx(loss["transformers"], rel=1e-5)
        assert loss["dense"] != pytest.approx(loss["accel"], rel=1e-5)
        assert cells[stage, "accel"]["samples_per_s"] > cells[stage, "dense"]["samples_per_s"]
    assert "against dense" in out and "samples/s" in out


@pytest.mark.slow
def test_evaluation(capsys):
    out, report = bench(capsys, "eval", "--preset", "toy", "--questions", "4", "--peer-questions", "1")
    cells = {cell["name"]: cell for cell in report["cells"]}
    assert len(cells) == 9 and all((c["asked"], c["peer_questions"]) == (4, 1) for c in cells.values())
    assert [cells[name]["of_images"] for name in ("POPE", "VQAv2 (test-dev)", "SEED (images)")] == [1, 1, 4]
    assert all(c["prompt"] == f"35 + 576 + {c['text'] + 2}" for c in cells.values())
    ours, theirs = (
        sum(c["questions"] / 3600 * c[seconds] / c[count] for c in cells.values())
        for seconds, count in (("seconds", "asked"), ("peer_seconds", "peer_questions"))
    )
    (line,) = (line for line in out.splitlines() if line.startswith("all nine"))
    assert line.split()[2:] == [f"{theirs / ours:.1f}x", f"{ours:.3f}", f"{theirs:.2f}"]
    assert report["first_s"] > cells["VQAv2 (test-dev)"]["seconds"] / 2


def test_a_command_is_shown_without_its_folders(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["/bin/vica", "bench", "flops", "--preset", "7b", "--json", str(tmp_path / "a b.json")]
    )
    assert origin("abc")["command"] == "vica bench flops --preset 7b --json 'a b.json'"


def test_only_the_stages_parts_learn(models):
    batches = make_batches(models, Mix(8, 0.4, 16, 1, 1.0, 0), 2, 2, seed=0)
    for stage, parts in (("pretrain", {"projector"}), ("finetune", {"projector", "language model"})):
        for column in ("transformers", "mask", "accel"):
            subject = (Peer if column == "transformers" else Ours)(models, column, stage)
            subject.loss(batches[0]).backward()
            learning = {part_of(name) for name, p in models.accel.named_parameters() if p.grad is not None}
            models.accel.zero_grad()
            subject.close()
            assert learning == parts


def test_order_of_the_questions():
    order = throughput.pope_order(8910, 500)
    assert len(order) == 8910 and set(order) == set(range(500))
    assert order[:7] == [0] * 6 + [1] and order[2970] == 0, "six on an image, three times over"


def test_memory(capsys):
    shape = ("--requests", "4", "--questions", "1", "4", "--answer", "9", "--visual", "16")
    out, found = bench(capsys, "memory", "--preset", "toy", *shape)
    cells = {(c["column"], c["questions"]): c for c in found["cells"]}
    assert all(c["kv_bytes"] == c["formula_bytes"] > 0 for c in cells.values()), cells
    row, visual = 8 * 2 * 256 * 4, 2 * 2 * 256 * 4  # 8 layers, of which 2 see the image
    for (column, questions), cell in cells.items():
        n = cell["running"]
        assert 1 < n <= 4
        assert (
            cell["kv_bytes"]
            == {
                "transformers": n * (35 + 16 + 33) * row,
                "dense": (35 + n * (16 + 33)) * row,
                "prefix": (35 + n * 33) * row + 16 * visual * (n if questions == 1 else 1),
            }[column]
        )
    assert cells["dense", 1]["alone_bytes"] == (35 + 16 + 33) * row == cells["transformers", 4]["alone_bytes"]
    assert "against dense" in out


def test_a_checkpoint(capsys, tmp_path):
    save(tmp_path / "toy")
    out, found = bench(capsys, "flops", "--model", str(tmp_path / "toy"), "--t2v-layers", "[1]", "--visual", "9")
    assert found["t2v_layers"] == [1] and not found["random_weights"]
    out, found = bench(
        capsys, "latency", "--model", str(tmp_path / "toy"), "--phases", "tower", "--batch", "1", "--repeats", "1"
    )
    assert found["model"] == str(tmp_path / "toy") and len(found["cells"]) == 3


# --- what goes wrong ----------------------------------------------------------------------------------------------

ONE_CELL = ("latency", "--preset", "toy", "--phases", "visual", "--visual", "8", "--repeats", "1", "--steps", "1")


def test_a_peer_that_fails_is_reported(capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel\nfor this card")

    monkeypatch.setattr(Transformers, "prefill", broken)
    out, found = bench(capsys, *ONE_CELL, "--columns", "transformers", "accel")
    cells = {c["column"]: c for c in found["cells"]}
    assert cells["transformers"]["failure"] == "RuntimeError: no such kernel for this card"
    assert "transformers: RuntimeError: no such kernel for this card" in out and cells["accel"]["ms"] > 0


def test_out_of_memory_is_a_finding(capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("tried to allocate 3 TiB")

    monkeypatch.setattr(Runner, "prefill", full)
    out, found = bench(capsys, *ONE_CELL, "--columns", "accel", "nothing")
    cells = {c["column"]: c for c in found["cells"]}
    assert cells["nothing"]["failure"] == "out of memory" and cells["accel"]["ms"] > 0
    assert "out of memory" in out


def test_our_own_failure_is_an_error(capsys, monkeypatch):
    def broken(*args):
        raise IndexError("a bug")

    monkeypatch.setattr(Runner, "prefill", broken)
    out, found = bench(capsys, *ONE_CELL, "--columns", "accel", "nothing", status=1)
    assert [c["failure"] for c in found["cells"]] == [None, "IndexError: a bug"]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("latency", "--batch", "0"), "--batch is 0; it must be at least 1"),
        (("latency", "--prefix", "-1"), "--prefix is -1; it must be at least 0"),
        (("latency", "--visual", "5000", "--phases", "visual"), "the model has 4096"),
        (("latency", "--plot", "times.svg"), "must end in .png"),
        (("flops", "--json", "/no/such/folder/x.json"), "there is no folder /no/such/folder"),
        (("memory", "--dtype", "auto"), "random weights need float32"),
        (("flops", "--t2v-layers", "[9]"), "is no layer of this model"),
    ],
    ids=str,
)
def test_mistakes(capsys, arguments, complaint):
    assert main(["bench", arguments[0], "--preset", "toy", "--device", "cpu", *arguments[1:]]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vica bench: ") and complaint in error


def test_a_plot_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["bench", *ONE_CELL, "--plot", "x.png"]) == 1
    assert capsys.readouterr().err == "vica bench: --plot needs matplotlib: pip install 'vica[bench]'\n"


def test_dense_uses_the_same_weights():
    config = tiny_config()
    assert dense(config).plan[0].updates and not config.plan[0].updates
