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
