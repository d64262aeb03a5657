"""When an evaluation's folder may be taken, continued or overwritten."""

import pytest

from laser_fast.config import ConfigError
from laser_fast.evaluation.folder import EvalFolder

SETTINGS = {"model": "m", "benchmarks": {"a": {"samples": 2}}, "score": {"beta": 0.1}}


@pytest.fixture
def folder(tmp_path):
    folder = EvalFolder(tmp_path / "out")
    folder.prepare(SETTINGS, overwrite=False)
    folder.keep_chunks("a", [], size=2, chunk=1)  # makes the benchmark's folder
    return folder


def _records(make_record, ids):
    return [make_record(prompt_id, sample) for prompt_id in ids for sample in range(2)]


def test_a_begun_folder_continues_with_the_same_settings(folder):
    folder.prepare({**SETTINGS, "score": {"beta": 0.2}}, overwrite=False)
    with pytest.raises(ConfigError, match='begun with another model: "m" against "n"'):
        folder.prepare({**SETTINGS, "model": "n"}, overwrite=False)
    with pytest.raises(ConfigError, match=r"another benchmarks\.a\.samples: 2 against 4; choose"):
        folder.prepare({**SETTINGS, "benchmarks": {"a": {"samples": 4}}}, overwrite=False)
    more = {"a": {"samples": 2}, "b": {"samples": 1}}
    with pytest.raises(ConfigError, match=r"another benchmarks\.b: null against {.samples.: 1}"):
        folder.prepare({**SETTINGS, "benchmarks": more}, overwrite=False)


def test_only_whole_chunks_are_kept(folder, make_record):
    ids = ["p0", "p1", "p2", "p3", "p4"]
    path = folder.samples("a")
    assert folder.keep_chunks("a", ids, size=2, chunk=2) == 0
    folder.append("a", _records(make_record, ids[:3]))
    with open(path, "a") as file:
        file.write('{"prompt_id": "p3", "sam')  # torn by a kill
    assert folder.keep_chunks("a", ids, size=2, chunk=2) == 2
    assert len(path.read_text().splitlines()) == 4
    folder.append("a", _records(make_record, ids[2:]))
    # The last chunk is short, and still whole.
    assert folder.keep_chunks("a", ids, size=2, chunk=2) == 5
    with pytest.raises(ConfigError, match=r"samples.jsonl: not the samples"):
        folder.keep_chunks("a", ids[::-1], size=2, chunk=2)


@pytest.mark.parametrize("num_whole", [0, 2, 5])
def test_a_torn_line_behind_whole_chunks_does_not_meet_the_next(folder, make_record, num_whole):
    ids = ["p0", "p1", "p2", "p3", "p4"]
    folder.append("a", _records(make_record, ids[:num_whole]))
    with open(folder.samples("a"), "a") as file:
        file.write('{"prompt_id": "p2", "sam')
    assert folder.keep_chunks("a", ids, size=2, chunk=2) == num_whole
    folder.append("a", _records(make_record, ids[num_whole:]))
    assert folder.keep_chunks("a", ids, size=2, chunk=2) == 5


def test_broken_settings_are_named(folder):
    folder.settings.write_text('{"model"')
    with pytest.raises(ConfigError, match=r"settings.json: not valid JSON"):
        folder.prepare(SETTINGS, overwrite=False)


def test_a_finished_folder_is_left_alone(folder, make_record):
    folder.append("a", _records(make_record, ["p0"]))
    folder.report.write_text("{}")
    with pytest.raises(ConfigError, match="finished evaluation; choose another folder"):
        folder.prepare(SETTINGS, overwrite=False)
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        folder.prepare(SETTINGS, overwrite=True)
    # What an evaluation wrote is gone, and nothing else.
    assert sorted(path.name for path in folder.path.rglob("*")) == ["notes.txt"]


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds other files"):
            EvalFolder(tmp_path).prepare(SETTINGS, overwrite=overwrite)
    with pytest.raises(ConfigError, match="is a file"):
        EvalFolder(tmp_path / "thesis.txt").prepare(SETTINGS, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
