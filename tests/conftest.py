import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(2)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for the network
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _no_layers_from_outside(monkeypatch):
    monkeypatch.delenv("T2V_LAYERS", raising=False)
