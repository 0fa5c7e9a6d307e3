"""What tests of `vica eval` as a program share."""

from pathlib import Path

from vica.testing import save
from vica.toy.benchmarks import write


def model_and_data(root: Path, pictures: int) -> Path:
    """A model of random weights, and beside it the nine benchmarks of so many pictures each."""
    save(root / "model")
    write(root / "data", pictures)
    return root
