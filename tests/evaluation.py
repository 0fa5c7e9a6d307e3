"""Shared setup of the tests that run `vica eval` as a program."""

from pathlib import Path

from vica.testing import save
from vica.toy.benchmarks import write


def model_and_data(root: Path, pictures: int) -> Path:
    """Writes a model of random weights, and beside it the nine benchmarks of `pictures` pictures each."""
    save(root / "model")
    write(root / "data", pictures)
    return root
