"""What has its name is whole: files and folders take their place at once."""

import pytest

from laser_fast.files import partial_name, replacing


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as partial:
        partial.write_text("n")
        raise OSError("full")
    assert path.read_text() == "old"
    with replacing(path) as partial:
        assert partial == partial_name(path) == tmp_path / ".x.json.partial"
        partial.write_text("new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    path = tmp_path / "model"
    for name in ("first", "second"):
        partial_name(path).mkdir()
        (partial_name(path) / "left").touch()  # by a process that was killed
        with replacing(path) as partial:
            partial.mkdir()
            (partial / name).touch()
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    path = tmp_path / "model"
    (tmp_path / "real").mkdir()
    path.symlink_to(tmp_path / "real")
    for name in ("first", "second"):
        with replacing(path) as partial:
            partial.mkdir()
            (partial / name).touch()
    assert path.is_symlink() and [p.name for p in (tmp_path / "real").iterdir()] == ["second"]
    assert {p.name for p in tmp_path.iterdir()} == {"model", "real"}


def test_a_crash_between_two_folders_loses_neither(tmp_path, monkeypatch):
    path, old = tmp_path / "model", tmp_path / ".model.old"
    for folder in (path, old):
        folder.mkdir()
        (folder / folder.name).touch()

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), replacing(path) as new:
        new.mkdir()
        patch.setattr(type(path), "replace", crash)
    assert new.is_dir() and [p.name for p in old.iterdir()] == ["model"]
    with replacing(path) as new:
        new.mkdir()
        assert old.is_dir()  # all that there is
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and not [*path.iterdir()]
