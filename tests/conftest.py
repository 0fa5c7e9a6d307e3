import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests import spm
from vica.data.processor import ViCAProcessor
from vica.data.tokenizer import load_tokenizer

if "PYTEST_XDIST_WORKER" in os.environ:
    # each worker has one core: more threads would spin against each other and slow everything tenfold
    torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never use the network
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("ci")


CORE, TRAIN = (Path(__file__).with_name(name) for name in ("core", "train"))
BESIDE_CORE = ("test_transformers.py", "test_checkpoints.py")  # files and other tools


def pytest_collection_modifyitems(items):
    """Marks as the core tier what lies in core/, but for slow tests and BESIDE_CORE; training comes first."""
    for item in items:
        if CORE in item.path.parents and item.path.name not in BESIDE_CORE and not item.get_closest_marker("slow"):
            item.add_marker("core")
    # The longest tests start processes of their own and wait for them: first, or one worker has them left at the end.
    items.sort(key=lambda item: TRAIN not in item.path.parents)


@pytest.fixture(autouse=True)
def _no_layers_from_outside(monkeypatch):
    monkeypatch.delenv("T2V_LAYERS", raising=False)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> bytes:
    return spm.train(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory, sentencepiece_model):
    """Makes one checkpoint folder for each pair of legacy and model_type."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        (legacy, kind): spm.llava_folder(root / f"{legacy}-{kind}", sentencepiece_model, legacy, kind)
        for legacy in (True, False, None)
        for kind in (None, "llava", "llava_llama", "mistral")
    }


@pytest.fixture
def tokenizer(folders):
    return load_tokenizer(folders[False, "llava_llama"])


@pytest.fixture
def processor(tokenizer):
    return ViCAProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer
    )
