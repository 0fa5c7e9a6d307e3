import os

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a worker has a core; threads that fight over it spin, and slow everything tenfold
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for the network
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _no_layers_from_outside(monkeypatch):
    monkeypatch.delenv("T2V_LAYERS", raising=False)
