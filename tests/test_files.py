import pytest

from vica.errors import ViCAError
from vica.files import whole_folder


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(ViCAError, match="folder could not be put in place.*nothing is overwritten"):
        with whole_folder(target) as partial:
            (partial / "mine").touch()
            target.mkdir()
            (target / "theirs").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/theirs"]
