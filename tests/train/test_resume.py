"""Tests a run that is started again: when it resumes, and when its output folder is refused."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from tests.training import arguments, trained, write_base
from vica.toy.write import write
from vica.train.run import main
from vica.train.trainer import ViCATrainer
from vica.utils.files import held


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_base(tmp_path_factory.mktemp("training"))
    write(root / "world", 300, 1)
    return root


@pytest.mark.parametrize(
    "before, now, said",
    [
        (dict(stage="pretrain"), dict(), "stage 1 or adapters, now the whole model"),
        (dict(), dict(stage="pretrain"), "the whole model, now stage 1 or adapters"),
        (dict(t2v_layers="[1]"), dict(), "t2v_layers [1], now [0, 2]"),
        (dict(freeze_prefix="true"), dict(freeze_prefix="1"), "freeze_prefix True, now 1"),
        (dict(variant="dense"), dict(), "dense True, now False"),
        (dict(), dict(mm_projector_lr=1e-4), "a rate of the projector's own False, now True"),
        (dict(), dict(freeze_backbone=True), "what learns ['projector', 'language model'], now ['projector']"),
        (dict(), dict(optim="sgd"), "optim 'adamw_torch', now 'sgd'"),
        (dict(lora_enable=True), dict(lora_enable=True, lora_alpha=1024), "lora_alpha 16, now 1024"),
        (dict(stage="pretrain"), dict(stage="pretrain", model_name_or_path="another"), "/another'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(root, tmp_path, capsys, before, now, said):
    """Its weights would be saved as this run's, untrained and under this run's layers, or its optimizer would begin
    anew."""
    if "lora_enable" in before:
        pytest.importorskip("peft")
    if "model_name_or_path" in now:
        now = now | {"model_name_or_path": shutil.copytree(root / "llm", tmp_path / "another")}
    saving = dict(save_strategy="steps", save_steps=1, max_steps=1)
    trained(root, tmp_path, **before, **saving)
    capsys.readouterr()
    assert main(arguments(root, tmp_path, **now, **saving)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"vica train: {tmp_path}/checkpoint-1 is of another run: ") and said in line


def test_an_output_with_another_kind_of_model_is_refused(root, tmp_path, capsys):
    """Files that stay there would be read in place of this run's."""
    pytest.importorskip("peft")
    whole, adapters = trained(root, tmp_path / "whole"), trained(root, tmp_path / "adapters", lora_enable=True)
    for folder, flags, said in (
        (adapters, dict(), "holds adapters already"),
        (whole, dict(lora_enable=True), "holds a whole model already"),
        (whole, dict(stage="pretrain"), "holds a whole model already"),
        (whole, dict(model_name_or_path=whole), "is the model that training starts from"),
    ):
        capsys.readouterr()
        assert main(arguments(root, folder, **flags)) == 1
        assert said in capsys.readouterr().err
    trained(root, whole)  # the same kind is accepted


def test_shards_of_an_earlier_model_are_removed(root, tmp_path):
    folder = trained(root, tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weights = dict.fromkeys(load_file(folder / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / "notes.bin").touch()
    trained(root, tmp_path, learning_rate=0.1)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.safetensors", "notes.bin"} and not any("-of-" in name or "index" in name for name in names)


def test_two_simultaneous_runs_do_not_share_an_output(root, tmp_path, capsys):
    with held(tmp_path, "another"):
        assert main(arguments(root, tmp_path)) == 1
    assert f"{tmp_path} is being written by another run; give this one another" in capsys.readouterr().err
    trained(root, tmp_path)


def test_a_resumed_run_says_so(root, tmp_path, capsys):
    trained(root, tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    assert "goes on from" not in capsys.readouterr().out
    trained(root, tmp_path, variant="mask")  # mask is the same function as accel: the same run
    assert f"goes on from {tmp_path}/checkpoint-1\n" in capsys.readouterr().out


def test_a_folder_that_is_no_checkpoint_is_refused(root, tmp_path, capsys):
    assert main(arguments(root, tmp_path, resume_from_checkpoint=root / "llm")) == 1
    assert f"{root}/llm is no checkpoint to go on from" in capsys.readouterr().err


def test_ctrl_c_says_that_the_run_can_be_resumed(root, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ViCATrainer, "training_step", interrupted)
    assert main(arguments(root, tmp_path)) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("vica train: stopped; started again")
