"""Tests `vica train` on a toy world, float32 on the CPU: which parts learn, that the variants learn alike, and what is
saved."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import vica
from tests import plans
from tests.builders import assert_close, tiny_model, tiny_vision
from tests.training import (
    ADAPTERS,
    LANGUAGE,
    LAYERS,
    PROJECTOR,
    WRAPPED,
    arguments,
    losses,
    tower_weights,
    trained,
    write_base,
)
from vica.cli.main import main as program
from vica.data.collate import Collator
from vica.data.training import Example
from vica.model import decoder, flow_accel, flow_mask
from vica.plan.layer import Drop, LayerPlan
from vica.toy.write import write
from vica.train import run
from vica.train.arguments import parse
from vica.train.run import main
from vica.train.trainer import ViCATrainer

IGNORE, IMAGE = -100, vica.IMAGE_TOKEN_INDEX


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_base(tmp_path_factory.mktemp("training"))
    write(root / "world", 300, 1)
    return root


@pytest.fixture(scope="module")
def stage1(root):
    return trained(root, root / "stage1", "pretrain")


@pytest.fixture(scope="module")
def stage2(root, stage1):
    return trained(root, root / "stage2", pretrain_mm_mlp_adapter=stage1)


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# --- parts that learn ---------------------------------------------------------------------------------------------


@pytest.fixture
def set_up(monkeypatch):
    """Collects the trainers of runs that stop before their first step."""
    trainers = []
    monkeypatch.setattr(ViCATrainer, "train", lambda self, **_: trainers.append(self))
    monkeypatch.setattr(run, "finish", lambda trainer: None)
    return trainers


LM = "language model"


@pytest.mark.parametrize(
    "flags, parts",
    [
        (dict(stage="pretrain"), {"projector"}),
        (dict(stage=None, tune_mm_mlp_adapter=True), {"projector"}),
        (dict(), {LM, "projector"}),
        (dict(stage=None), {LM, "projector"}),
        (dict(freeze_mm_mlp_adapter=True), {LM}),
        (dict(freeze_backbone=True), {"projector"}),
        (dict(unfreeze_mm_vision_tower=True), {LM, "projector", "tower"}),
        (dict(freeze_backbone=True, unfreeze_mm_vision_tower=True), {"projector", "tower"}),
        (dict(lora_enable=True), {"adapters", "projector"}),
        (dict(lora_enable=True, freeze_mm_mlp_adapter=True), {"adapters"}),
    ],
)
def test_parts_that_learn(root, tmp_path, set_up, capsys, flags, parts):
    if "adapters" in parts:
        pytest.importorskip("peft")
    names = {LM: LANGUAGE, "projector": PROJECTOR, "adapters": ADAPTERS, "tower": tower_weights(root).keys()}
    assert main(arguments(root, tmp_path, **flags)) == 0
    learning = {name: p.numel() for name, p in set_up[0].model.named_parameters() if p.requires_grad}
    in_front = WRAPPED if "adapters" in parts else ""
    assert learning.keys() == {in_front + name for part in parts for name in names[part]}

    head, *rows = capsys.readouterr().out.splitlines()[1:-1]
    assert head.split() == ["part", "parameters", "trainable"]
    shown = {row[:16].strip(): [int(x.replace(",", "")) for x in row[16:].split()] for row in rows}
    assert shown.keys() == {LM, "projector", "tower"} | (parts & {"adapters"})
    for part, (size, trainable) in shown.items():
        assert trainable == sum(learning.get(in_front + name, 0) for name in names[part])
        assert trainable == (size if part in parts else 0)


def test_nothing_left_to_learn(root, tmp_path, capsys):
    assert main(arguments(root, tmp_path, freeze_backbone=True, freeze_mm_mlp_adapter=True)) == 1
    assert "nothing is left to train" in capsys.readouterr().err


def test_a_process_trains_on_one_card_of_all_that_it_sees(root, tmp_path):
    args = parse(arguments(root, tmp_path))[2]
    args._n_gpu = 8  # as transformers counts the cards without a launcher
    assert (args.n_gpu, args.train_batch_size) == (1, 2) and args.parallel_mode.name == "NOT_PARALLEL"


@pytest.mark.parametrize("seeds, of_order", [({}, 42), ({"seed": 3}, 3), ({"seed": 3, "data_seed": 0}, 0)])
def test_the_order_has_a_seed_of_its_own(root, tmp_path, set_up, seeds, of_order):
    assert main(arguments(root, tmp_path, group_by_length=True, **seeds)) == 0
    assert set_up[0]._get_train_sampler().seed == of_order


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, checkpointing", [("pretrain", False), pytest.param("finetune", True, marks=pytest.mark.slow)]
)
def test_accel_trains_as_mask(root, tmp_path, stage, checkpointing):
    """Trains 50 steps. The largest differences seen were 1.4e-6 (loss) and 3.3e-7 (weights). Other layers differ by
    1e-2."""
    runs = {
        "accel": dict(variant="accel", gradient_checkpointing=checkpointing),
        "mask": dict(variant="mask"),
        "other layers": dict(variant="mask", t2v_layers="[0, 1]"),
    }
    got, weights = {}, {}
    for name, flags in runs.items():
        folder = trained(root, tmp_path / name, stage, max_steps=50, **flags)
        got[name] = torch.tensor(losses(folder))
        file = folder / ("trained.safetensors" if stage == "pretrain" else "model.safetensors")
        weights[name] = load_file(file)
    assert len(got["mask"]) == 50 and got["mask"][-1] < got["mask"][0]
    assert_close(got["accel"], got["mask"], 1e-4)
    assert largest_difference(weights["accel"], weights["mask"]) < 1e-4
    assert (got["other layers"] - got["mask"]).abs().max() > 1e-2
    assert largest_difference(weights["other layers"], weights["mask"]) > 1e-2


def test_accumulated_steps_equal_large_ones(root, tmp_path):
    """Uses samples of different lengths, so that a mean over the pieces' means would be another loss, grouped as in
    LLaVA, so that a step's samples are the same. The largest differences seen: 4.8e-7 (loss), 2.4e-7 (weights)."""
    flags = dict(max_steps=10, group_by_modality_length=True)
    whole = trained(root, tmp_path / "whole", per_device_train_batch_size=8, **flags)
    pieces = trained(root, tmp_path / "pieces", gradient_accumulation_steps=4, **flags)
    assert_close(torch.tensor(losses(pieces)), torch.tensor(losses(whole)), 1e-5)
    assert largest_difference(load_file(pieces / "model.safetensors"), load_file(whole / "model.safetensors")) < 1e-5


# Numbers of text tokens, and I for an image.
SAMPLES = ["2 I 5", "3 I 2 I 4", "7", "I I 3", "1 I 9", "4"]


def example(parts: str, seed: int) -> Example:
    """Returns an example with labels on all tokens that can be learned: none after an image. The first token has one
    too, which must be ignored."""
    dice = torch.Generator().manual_seed(seed)
    ids, labels = [], []
    for part in parts.split():
        words = [IMAGE] if part == "I" else torch.randint(3, 97, (int(part),), generator=dice).tolist()
        labels += [IGNORE if part == "I" or ids else words[0], *words[1:]]
        ids += words
    pixels = [torch.randn(3, 28, 28, generator=dice) for _ in range(ids.count(IMAGE))]
    return Example(parts, torch.tensor(ids), torch.tensor(labels), pixels)


def loss_and_gradients(model, examples: list[Example], **options):
    batch = Collator(pad_id=0)(examples)
    model.zero_grad()
    output = model(**{name: batch[name] for name in batch if name not in ("sample_ids", "broken")}, **options)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
@pytest.mark.parametrize("skip_logits", [True, False])
def test_packed_equals_one_by_one(variant, skip_logits):
    model = tiny_model(vision_config=tiny_vision(), variant=variant).train()
    examples = [example(parts, seed) for seed, parts in enumerate(SAMPLES)]
    output, packed = loss_and_gradients(model, examples, skip_logits=skip_logits)
    assert (output.logits is None) == skip_logits
    total, summed = 0, dict.fromkeys(packed, 0)
    counts = [(x.labels[1:] != IGNORE).sum().item() for x in examples]
    for one, count in zip(examples, counts):
        alone, gradients = loss_and_gradients(model, [one], skip_logits=skip_logits)
        total += alone.loss * count / sum(counts)
        for name, gradient in gradients.items():
            summed[name] = summed[name] + gradient * count / sum(counts)
    assert_close(output.loss, total, 1e-5)
    assert all(name in packed for name in PROJECTOR | LANGUAGE)
    for name, gradient in packed.items():
        assert_close(gradient, summed[name], 1e-5, name)


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
@pytest.mark.parametrize("tower_learns", [False, True])
def test_text_alone_gives_the_vision_side_a_gradient_of_zeros(variant, tower_learns):
    """With None, ranks that saw an image would wait for those that saw none, and Adam would skip weights that it
    otherwise moves."""
    model = tiny_model(vision_config=tiny_vision(), variant=variant).train()
    model.model.vision_tower.requires_grad_(tower_learns)
    _, seen = loss_and_gradients(model, [example("2 I 5", 0)], skip_logits=True)
    _, gradients = loss_and_gradients(model, [example("7", 0), example("4", 1)], skip_logits=True)
    assert gradients.keys() == seen.keys() and (gradients.keys() == PROJECTOR | LANGUAGE) != tower_learns
    assert all(gradients[name].any() == (name in LANGUAGE) for name in gradients)


class Recorded(dict):
    """A module's parameters. `asked` lists those that are looked up, as ZeRO-3 gathers them."""

    def __init__(self, module, name: str, asked: list[str]):
        super().__init__(module._parameters)
        self.name, self.asked = name, asked

    def __getitem__(self, key):
        self.asked.append(f"{self.name}.{key}")
        return super().__getitem__(key)


PLANS = {
    "as the variant says": None,
    "pyramiddrop": plans.pyramiddrop(4, [1, 2], [0.5, 0.2]),
    "fastv on shortv": plans.with_drops(plans.shortv(4, [0, 2]), {2: Drop(0.5, "previous")}),
    "vica and pyramiddrop": plans.vica_pyramiddrop(4, [0, 2], True, [2], [0.5]),
    "blind, then skipped": [*plans.visipruner_shallow(2, 1), LayerPlan("skip"), LayerPlan("read")],
}


@pytest.mark.parametrize("variant, plan", [(v, p) for p in PLANS for v in ("accel", "mask", "dense")], ids=str)
@pytest.mark.parametrize("tower_learns", [False, True])
def test_ranks_gather_weights_in_the_same_order(variant, plan, tower_learns, monkeypatch):
    """With images or without: a rank that gathers a weight alone waits for it forever."""
    for module in (decoder, flow_accel, flow_mask):
        monkeypatch.setattr(module, "among_ranks", lambda: True)
    model = tiny_model(vision_config=tiny_vision(), variant=variant).train()
    if PLANS[plan] is not None:
        model.config.plan = PLANS[plan]
    model.model.vision_tower.requires_grad_(tower_learns)
    asked, orders = [], []
    for name, module in model.named_modules():
        module._parameters = Recorded(module, name, asked)
    for parts in ("2 I 5", "I I 3", "7"):
        loss_and_gradients(model, [example(parts, 0)], skip_logits=True)
        orders.append(asked.copy())
        asked.clear()
    assert len(orders[0]) > 100 and orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
def test_training_on_text_alone(root, tmp_path, variant):
    samples = [x for x in json.loads((root / "world/finetune.json").read_text()) if "image" not in x]
    (tmp_path / "text.json").write_text(json.dumps(samples))
    folder = trained(root, tmp_path / "out", data_path=tmp_path / "text.json", variant=variant, image_folder=None)
    assert len(losses(folder)) == 2


# --- from stage to stage ------------------------------------------------------------------------------------------


def test_stage_1_writes_the_projector_as_llava_does(root, stage1):
    projector = torch.load(stage1 / "mm_projector.bin", weights_only=True)
    assert projector.keys() == PROJECTOR
    assert all(x.dtype == torch.float32 for x in projector.values())


def test_a_plain_language_model_causes_no_warning(root, tmp_path, caplog):
    trained(root, tmp_path, "pretrain")
    assert "holds no vision tower" not in caplog.text


def test_base_models_come_from_the_hubs_cache(root, tmp_path):
    """Both base models lie in --cache_dir and nowhere else."""
    for name in ("llm", "tower"):
        place = tmp_path / f"cache/models--someone--{name}"
        shutil.copytree(root / name, place / "snapshots/1")
        (place / "refs").mkdir()
        (place / "refs/main").write_text("1")
    flags = dict(model_name_or_path="someone/llm", vision_tower="someone/tower", cache_dir=tmp_path / "cache")
    trained(root, tmp_path / "out", "pretrain", **flags)


@pytest.mark.parametrize("file", ["mm_projector.bin", ""])
def test_stage_2_starts_from_stage_1(root, stage1, tmp_path, set_up, file):
    assert main(arguments(root, tmp_path, pretrain_mm_mlp_adapter=stage1 / file)) == 0
    projector = torch.load(stage1 / "mm_projector.bin", weights_only=True)
    begun = {name: p.data for name, p in set_up[0].model.named_parameters() if name in PROJECTOR}
    assert largest_difference(projector, begun) == 0


def test_a_file_without_a_whole_projector(root, stage1, tmp_path, capsys):
    projector = torch.load(stage1 / "mm_projector.bin", weights_only=True)
    torch.save({"lm_head.weight": torch.ones(2)}, tmp_path / "none.bin")
    torch.save({k: v for k, v in projector.items() if k.endswith("weight")}, tmp_path / "half.bin")
    said = {"none.bin": "holds no weights of a projector", "half.bin": "missing: model.mm_projector.0.bias"}
    for name, reason in said.items():
        assert main(arguments(root, tmp_path / "out", pretrain_mm_mlp_adapter=tmp_path / name)) == 1
        assert reason in capsys.readouterr().err


def test_stage_2_writes_a_checkpoint(root, stage2):
    settings = json.loads((stage2 / "config.json").read_text())
    assert settings["t2v_layers"] == json.loads(LAYERS) and settings["conversation"] == "vicuna_v1"
    model, processor = vica.load(stage2, device="cpu")
    assert model.config.t2v_layers == json.loads(LAYERS) and processor.conversation == "vicuna_v1"
    inputs = processor.ask("What is it?", images=[root / "world/images/train/000000.png"])
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_stage_2_writes_a_checkpoint_even_if_it_learns_little(root, stage1, tmp_path):
    flags = dict(freeze_backbone=True, unfreeze_mm_vision_tower=True, pretrain_mm_mlp_adapter=stage1)
    folder = trained(root, tmp_path, **flags)
    model, _ = vica.load(folder, device="cpu")
    begun = load_file(root / "llm/model.safetensors") | torch.load(stage1 / "mm_projector.bin", weights_only=True)
    begun |= tower_weights(root)
    learned = {name for name, x in model.state_dict().items() if not torch.equal(x, begun[name])}
    assert learned - PROJECTOR == learned & tower_weights(root).keys() != set()
    assert learned >= PROJECTOR


def test_finetune_from_a_checkpoint(root, stage2, tmp_path):
    """The checkpoint decides tower, projector and layers. The run decides template and image mode, also in the saved
    model."""
    flags = dict(model_name_or_path=stage2, vision_tower=None, t2v_layers=None, image_aspect_ratio="crop")
    folder = trained(root, tmp_path, **flags, version="llama_2", learning_rate=0)
    assert largest_difference(load_file(folder / "model.safetensors"), load_file(stage2 / "model.safetensors")) == 0
    model, processor = vica.load(folder, device="cpu")
    assert model.config.t2v_layers == json.loads(LAYERS)
    assert (processor.conversation, processor.image_mode) == ("llama_2", "crop")


def test_the_saved_model_has_the_precision_of_its_use(root, tmp_path):
    """A checkpoint keeps the learning weights in float32, to resume exactly."""
    folder = trained(root, tmp_path, bf16=True, save_strategy="steps", save_steps=2)
    last, final = (load_file(x / "model.safetensors") for x in (folder / "checkpoint-2", folder))
    assert {x.dtype for x in final.values()} == {torch.bfloat16}
    assert all(last[name].dtype == torch.float32 for name in LANGUAGE | PROJECTOR)
    assert largest_difference({k: x.bfloat16() for k, x in last.items()}, final) == 0
    assert vica.load(folder, device="cpu")[0].dtype == torch.bfloat16


def test_vision_settings_of_a_checkpoint_cannot_change(root, tmp_path, capsys):
    model = trained(root, tmp_path / "model")
    for name, value in (("mm_projector_type", "linear"), ("mm_vision_select_layer", -1)):
        assert main(arguments(root, tmp_path / "more", model_name_or_path=model, **{name: value})) == 1
        assert f"--{name} is {value!r}, but {model} was trained with " in capsys.readouterr().err
    trained(root, tmp_path / "more", model_name_or_path=model, mm_projector_type="mlp2x_gelu")


def test_a_warmup_of_zero_steps(root, tmp_path):
    folder = trained(root, tmp_path, warmup_steps=0, lr_scheduler_type="constant_with_warmup")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in history if "learning_rate" in entry] == [1e-3, 1e-3]


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_loss_of_nan_stops_the_run(root, tmp_path, capsys):
    """The rate of step 1 is 0, since it warms up; that of step 2 ruins the weights, which step 3 uses."""
    flags = dict(learning_rate=1e30, max_steps=6, save_strategy="steps", save_steps=1, save_total_limit=9)
    assert main(arguments(root, tmp_path, **flags)) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "the loss is nan at step 3 for the samples train-0" in error
    assert sorted(x.name for x in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "model.safetensors").exists()


@pytest.fixture
def broken(root, tmp_path):
    """Writes eight samples, two of which have no picture."""
    samples = json.loads((root / "world/finetune.json").read_text())[:8]
    samples[3]["image"] = samples[6]["image"] = "train/nowhere.png"
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(samples))
    return path


def test_broken_samples_are_left_out(root, tmp_path, broken, capsys):
    """Uses one sample a step, so that a step may have nothing to learn from."""
    flags = dict(data_path=broken, max_broken_share=0.25, per_device_train_batch_size=1, max_steps=8)
    folder = trained(root, tmp_path / "out", **flags)
    report = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert sorted(x["id"] for x in report) == ["train-000003", "train-000006"]
    assert all("nowhere.png" in x["reason"] for x in report)
    assert "2 samples were left out" in capsys.readouterr().out
    assert losses(folder).count(0) == 2


def test_repaired_samples_no_longer_count_as_broken(root, tmp_path, broken, capsys):
    flags = dict(data_path=broken, max_broken_share=0.2, max_steps=8)
    assert main(arguments(root, tmp_path / "out", **flags)) == 1
    samples = json.loads(broken.read_text())
    samples[3]["image"] = samples[2]["image"]
    broken.write_text(json.dumps(samples))
    trained(root, tmp_path / "out", **flags)
    (line,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "train-000006" and "1 samples were left out" in capsys.readouterr().out


def test_too_many_broken_samples(root, tmp_path, broken, capsys):
    assert main(arguments(root, tmp_path / "out", data_path=broken, max_broken_share=0.2, max_steps=8)) == 1
    assert "2 of 8 samples are broken, more than the 20.00% allowed" in capsys.readouterr().err
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(data_path="nowhere.json"), "nowhere.json: no such file or folder"),
        (dict(data_path=None), "--data_path is missing"),
        (dict(image_folder="nowhere"), "'nowhere': no such folder"),
        (dict(model_name_or_path="./nowhere"), "./nowhere is no folder"),
        (dict(vision_tower="./nowhere"), "'./nowhere'"),
        (dict(vision_tower=None), "--vision_tower names none"),
        (dict(stage="both"), "--stage is 'both'; it must be one of pretrain, finetune"),
        (dict(streaming=True, max_steps=None), "--streaming has no known length: give --max_steps"),
        (dict(tune_mm_mlp_adapter=True), "means --stage pretrain, not 'finetune'"),
        (dict(stage="pretrain", lora_enable=True), "--lora_enable True belongs to stage finetune"),
        (dict(t2v_layers="[0, 9]"), "9"),
        (dict(pretrain_mm_mlp_adapter="nowhere.bin"), "nowhere.bin is no file"),
        (dict(mm_patch_merge_type="spatial"), "--mm_patch_merge_type is 'spatial'; only 'flat'"),
        (dict(config="nowhere.json"), "config 'nowhere.json' is no file"),
        (dict(version="v9"), "unknown conversation template 'v9'"),
        (dict(no_such_flag=1), "--no_such_flag"),
        (dict(eval_strategy="steps"), "there is no evaluation while training"),
        (dict(report_to="paper"), "paper is not supported"),
        (dict(optim="lomo"), "lomo_optim"),
        (dict(output_dir="/proc/out"), "/proc/out"),
        (dict(per_device_train_batch_size=0), "--per_device_train_batch_size is 0; it must be 1 at least"),
        (dict(gradient_accumulation_steps=-2), "--gradient_accumulation_steps is -2; it must be 1 at least"),
        (dict(dataloader_num_workers=-1), "--dataloader_num_workers is -1; it must be 0 at least"),
        (dict(learning_rate=-1), "--learning_rate is -1.0; it must be 0 at least"),
        (dict(seed=-1), "--seed is -1; it must be 0 at least"),
        (dict(learning_rate="nan"), "--learning_rate is nan; it must be 0 at least"),
        (dict(mm_projector_lr=-1), "--mm_projector_lr is -1.0; it must be 0 at least"),
        (
            dict(label_smoothing_factor=0.1),
            "--label_smoothing_factor is not supported: the loss is made",
        ),
        (dict(neftune_noise_alpha=5), "--neftune_noise_alpha is not supported: rows are packed"),
        (dict(fp16=True), "--fp16 needs a GPU"),
        (dict(adam_beta1=2), "Invalid beta parameter"),
        (dict(lr_scheduler_type="cosine_with_min_lr"), "min_lr"),
        (dict(dataloader_drop_last=True, per_device_train_batch_size=512), "no step was taken"),
    ],
)
def test_mistakes_are_one_line(root, tmp_path, capsys, flags, said):
    assert program(["train", *arguments(root, tmp_path / "out", **flags)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vica train: ") and said in line


@pytest.mark.parametrize("missing", ["data_path", "image_folder"])
def test_missing_data_is_reported_before_a_model_is_loaded(root, tmp_path, monkeypatch, missing):
    monkeypatch.setattr(run, "build", lambda *_: pytest.fail("loaded"))
    assert main(arguments(root, tmp_path, **{missing: "nowhere"})) == 1


def test_values_that_the_parser_refuses(root, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        program(["train", *arguments(root, tmp_path, lora_bias="some")])
    assert stopped.value.code == 2
    assert "invalid choice: 'some'" in capsys.readouterr().err
