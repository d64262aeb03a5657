"""Names of benchmarks to data sets and protocols."""

import pytest

from laser_fast.cli import _measured
from laser_fast.config import ConfigError
from laser_fast.evaluation.benchmarks import NAMES, find_benchmark


def test_the_papers_samples_per_problem():
    samples = {name: find_benchmark(name).samples for name in NAMES}
    assert samples["math500"] == samples["olympiadbench"] == 2
    assert samples["amc23"] == samples["aime24"] == samples["aime25"] == 32


@pytest.mark.parametrize("place", ["amc23.jsonl", "eval/amc23.jsonl", "amc23/test.jsonl"])
def test_a_name_is_found_in_the_data_folder(place, tmp_path):
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}\n")
    found = find_benchmark("amc23", data_dir=tmp_path)
    assert found.source == str(file)
    # The published file and the hub's copy call the question differently.
    assert (found.prompt_field, found.answer_field) == ("problem", "answer")
    assert find_benchmark("amc23").prompt_field == "question"


def test_files_stand_in_for_a_name(tmp_path):
    files = {"sandbox": tmp_path / "a.jsonl"}
    found = find_benchmark("sandbox", data_dir=tmp_path, files=files)
    assert (found.name, found.source) == ("sandbox", str(tmp_path / "a.jsonl"))


def test_the_problems_of_the_sandbox_are_drawn_with_the_seed(tmp_path, monkeypatch):
    def cached_rows(split, seed, task):
        return f"{task}-{split}-{seed}.jsonl"

    monkeypatch.setattr("laser_fast.sandbox.files.cached_rows", cached_rows)
    file = tmp_path / "run.toml"
    file.write_text("seed = 3\n")
    for config, overrides, seed in ((None, [], 0), (file, [], 3), (file, ["seed=5"], 5)):
        [(benchmark, measured)] = _measured(
            ["sandbox"], None, "m", config=config, overrides=overrides
        )
        assert (benchmark.source, measured.seed) == (f"sandbox-eval-{seed}.jsonl", seed)
    [(benchmark, _)] = _measured(["sandbox"], None, "m", is_calibration=True)
    assert benchmark.source == "sandbox-train-0.jsonl"
    both = [found.source for found, _ in _measured(["sandbox-hard", "sandbox"], None, "m")]
    assert both == ["sandbox-hard-eval-0.jsonl", "sandbox-eval-0.jsonl"]


def test_a_missing_file_of_a_name_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"has none of aime24.jsonl, .* hub"):
        find_benchmark("aime24", data_dir=tmp_path)


def test_files_and_hub_ids_keep_the_users_fields(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("{}\n")
    found = find_benchmark(str(file), data_dir=tmp_path)
    assert (found.name, found.source, found.prompt_field) == ("mine", str(file), "")
    assert find_benchmark("owner/name").source == "owner/name"
    # The name is also that of a folder.
    assert find_benchmark("owner/name:main").name == "name_main"


def test_an_unknown_name_is_met_with_the_nearest():
    with pytest.raises(ConfigError, match='expected math500, .* did you mean "math500"'):
        find_benchmark("math5000")
