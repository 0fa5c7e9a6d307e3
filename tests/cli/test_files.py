import os
import shutil
import signal
from types import SimpleNamespace

import pytest

from vica.utils.errors import ViCAError
from vica.utils.files import held, room_needed, whole_folder


def test_a_folder_made_meanwhile_by_another_process_is_kept(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(ViCAError, match="folder could not be put in place.*nothing is overwritten"):
        with whole_folder(target) as partial:
            (partial / "mine").touch()
            target.mkdir()
            (target / "theirs").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/theirs"]


@pytest.mark.parametrize("name", ["link", "."])
def test_a_folder_by_another_name(tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    target = tmp_path / "link" if name == "link" else tmp_path.__class__(name)
    with whole_folder(target) as partial:
        (partial / "mine").touch()
    assert (tmp_path / "empty" / "mine").exists()


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with held(tmp_path, "take another"):
        with pytest.raises(ViCAError, match="is being written by another run; take another"):
            with held(tmp_path, "take another"):
                pass
    with held(tmp_path, "take another"):
        pass


def test_a_killed_run_frees_its_folder_while_its_workers_live(tmp_path):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with held(tmp_path, ""):
            worker = os.fork()
            os.write(tell, str(worker or 0).encode()) if worker else signal.pause()
            signal.pause()
    worker = int(os.read(ready, 20))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        with held(tmp_path, ""):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("error", [OSError("no"), RuntimeError("[enforce fail at inline_container.cc:672]")])
def test_a_full_disk_is_reported_as_such(tmp_path, monkeypatch, error):
    def write():
        with room_needed(tmp_path / "new" / "folder"):
            raise error

    with pytest.raises(type(error)):
        write()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(ViCAError, match="folder could not be written: the disk is full"):
        write()
