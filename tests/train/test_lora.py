"""Tests adapters: which weights move, which files are written, and that merging gives the trained model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vica
from tests.builders import assert_close
from tests.training import ADAPTERS, LANGUAGE, LAYERS, PROJECTOR, WRAPPED, arguments, tower_weights, write_base
from vica.cli.main import main as program
from vica.toy.write import write
from vica.train.run import main
from vica.train.trainer import ViCATrainer

pytest.importorskip("peft")

FILE = "model.safetensors"
FILES = {"adapter_model.safetensors", "adapter_config.json", "non_lora_trainables.bin", "config.json"}
BIASES = {f"model.layers.{i}.self_attn.{x}_proj.bias" for i in range(4) for x in "qkvo"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_base(tmp_path_factory.mktemp("adapters"), attention_bias=True)
    write(root / "world", 40, 1)
    return root


def train_adapters(root: Path, output: Path, **flags):
    """Returns the adapter model as it is after training."""
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        save = ViCATrainer.save_model
        patch.setattr(ViCATrainer, "save_model", lambda self, *a: kept.update(model=self.model) or save(self, *a))
        assert main(arguments(root, output, lora_enable=True, lora_r=4, learning_rate=1e-2, max_steps=4, **flags)) == 0
    return kept["model"].eval()


@pytest.fixture(scope="module")
def adapters(root):
    """Returns the folder, and the model that wrote it."""
    return root / "lora", train_adapters(root, root / "lora")


def logits(model, processor, root: Path) -> torch.Tensor:
    picture = root / "world/images/train/000000.png"
    with torch.no_grad():
        return model(**processor.ask("What is in the picture?", images=[picture])).logits


def merged_logits(folder: Path, target: Path, root: Path, *flags: str) -> torch.Tensor:
    assert program(["convert", str(folder), str(target), "--to", "vica", *flags]) == 0
    model, processor = vica.load(target, device="cpu")
    assert model.state_dict().keys() >= LANGUAGE | PROJECTOR
    return logits(model, processor, root)


def test_only_adapters_and_projector_move(root, adapters):
    folder, model = adapters
    base = load_file(root / "llm" / FILE) | tower_weights(root)
    after = {plain(name): x for name, x in model.state_dict().items()}
    assert base.keys() == {name for name in after if "lora_" not in name} - PROJECTOR
    assert all(torch.equal(base[name], after[name]) for name in base)
    moved = load_file(folder / "adapter_model.safetensors")
    assert all(x.any() for name, x in moved.items() if "lora_B" in name), "B begins as zeros"


def plain(name: str) -> str:
    return name.removeprefix(WRAPPED).replace(".base_layer", "")


def test_files_are_llavas(root, adapters):
    folder, _ = adapters
    assert {x.name for x in folder.iterdir()} >= FILES
    assert not (folder / FILE).exists()
    written = load_file(folder / "adapter_model.safetensors")
    assert written.keys() == {WRAPPED + name.replace(".default", "") for name in ADAPTERS}
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    assert others.keys() == {WRAPPED + name for name in PROJECTOR}
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(root / "llm")
    assert json.loads((folder / "config.json").read_text())["t2v_layers"] == json.loads(LAYERS)


def test_merged_is_the_adapter_model(root, adapters, tmp_path):
    folder, model = adapters
    got = merged_logits(folder, tmp_path / "merged", root)
    loaded, processor = vica.load(tmp_path / "merged", device="cpu")
    assert_close(got, logits(model, processor, root), 1e-5)
    with model.disable_adapter():
        assert (got - logits(model, processor, root)).abs().max() > 0.1


def test_merged_into_a_checkpoint(root, adapters, tmp_path):
    """Merges into a checkpoint with a tower and a projector of its own; the adapters' projector replaces the latter."""
    first, second = tmp_path / "first", tmp_path / "second"
    merged_logits(adapters[0], first, root)
    model = train_adapters(root, second, model_name_or_path=first, t2v_layers=None, vision_tower=None)
    got = merged_logits(second, tmp_path / "merged", root)
    assert_close(got, logits(model, vica.load(first, device="cpu")[1], root), 1e-5)


def test_a_frozen_projector_goes_with_the_adapters(root, adapters, tmp_path):
    """The adapters' folder alone shows which projector was used in training, the base's or stage 1's."""
    first = tmp_path / "first"
    assert main(arguments(root, first, stage="pretrain", learning_rate=0.1)) == 0
    frozen = dict(pretrain_mm_mlp_adapter=first, freeze_mm_mlp_adapter=True)
    model = train_adapters(root, tmp_path / "lora", **frozen)
    processor = vica.load(adapters_base(root, adapters, tmp_path), device="cpu")[1]
    assert_close(merged_logits(tmp_path / "lora", tmp_path / "merged", root), logits(model, processor, root))


def adapters_base(root: Path, adapters, tmp_path) -> Path:
    """Returns any whole model with the same tokens."""
    assert program(["convert", str(adapters[0]), str(tmp_path / "whole"), "--to", "vica"]) == 0
    return tmp_path / "whole"


def test_biases_learn_if_lora_bias_is_all(root, tmp_path):
    model = train_adapters(root, tmp_path / "lora", lora_bias="all")
    others = torch.load(tmp_path / "lora/non_lora_trainables.bin", weights_only=True)
    assert {plain(name) for name in others} == PROJECTOR | BIASES
    got = merged_logits(tmp_path / "lora", tmp_path / "merged", root)
    assert_close(got, logits(model, vica.load(tmp_path / "merged", device="cpu")[1], root), 1e-5)


def llava_folder(source: Path, folder: Path, root: Path) -> Path:
    """Writes a folder as LLaVA does: no tokenizer, a flat config that names no layers, and adapted maps by their last
    name, which the tower also has."""
    shutil.copytree(source, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "trained.safetensors"):
        (folder / name).unlink()
    settings = json.loads((folder / "config.json").read_text())
    for name in ("t2v_layers", "freeze_prefix", "variant", "conversation", "vision_config"):
        del settings[name]
    settings |= {"model_type": "llava_llama", "mm_vision_tower": str(root / "tower")}
    (folder / "config.json").write_text(json.dumps(settings))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "base_model_name_or_path": "someone/vicuna",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("in_front", ["base_model.model.", "base_model.", ""])
def test_llavas_folders_merge(root, adapters, tmp_path, in_front):
    folder = llava_folder(adapters[0], tmp_path / "llava", root)
    file = folder / "non_lora_trainables.bin"
    others = torch.load(file, weights_only=True)
    torch.save({in_front + name.removeprefix(WRAPPED): x for name, x in others.items()}, file)
    got = merged_logits(folder, tmp_path / "merged", root, "--base", str(root / "llm"), "--t2v-layers", LAYERS)
    assert_close(got, logits(adapters[1], vica.load(tmp_path / "merged", device="cpu")[1], root), 1e-5)


def test_folders_that_cannot_be_merged(root, adapters, tmp_path, capsys):
    def fails(source: Path, *flags: str) -> str:
        capsys.readouterr()
        assert program(["convert", str(source), str(tmp_path / "out"), "--to", "vica", *flags]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert not (tmp_path / "out").exists()
        return line

    folder = adapters[0]
    cut = shutil.copytree(folder, tmp_path / "cut")
    weights = load_file(cut / "adapter_model.safetensors")
    lost = sorted(weights)[0]
    save_file({name: x for name, x in weights.items() if name != lost}, cut / "adapter_model.safetensors")
    assert f"{lost} is in one of the two only" in fails(cut)

    narrow = shutil.copytree(folder, tmp_path / "narrow")
    save_file({name: x[:, :-1].contiguous() for name, x in weights.items()}, narrow / "adapter_model.safetensors")
    assert "do not fit" in fails(narrow)

    alone = shutil.copytree(folder, tmp_path / "alone")
    (alone / "non_lora_trainables.bin").unlink()
    assert "missing: model.mm_projector.0.bias" in fails(alone)

    nameless = shutil.copytree(folder, tmp_path / "nameless")
    (nameless / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "does not name its base model: give --base" in fails(nameless)

    merged_logits(folder, tmp_path / "whole", root)
    assert "holds no adapters to merge" in fails(tmp_path / "whole", "--base", str(root / "llm"))


def test_adapters_alone_are_no_checkpoint(adapters):
    with pytest.raises(vica.ViCAError, match="vica convert"):
        vica.load(adapters[0], device="cpu")
