"""Runs for tests/runs on two ranks, and a reward function of a user's own module.

    python train_ranks.py CONFIG.toml ...

A run that is refused prints why; a file named like a supervised phase is one.
"""

import sys


def reward(completions, answers):
    """Right or wrong at random, as seen by a policy; one in three is right whatever it says."""
    return [float(sum(map(ord, text)) % 3 == 0) for text in completions]


def main():
    # What the ranks would each import on their own, which takes longer than their runs.
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    from fork_ranks import run_ranks

    import laser_fast.report.page
    import laser_fast.sandbox.files
    import laser_fast.training.run  # noqa: F401
    from laser_fast.cli import train_run
    from laser_fast.config import ConfigError, load_config
    from laser_fast.config_sft import SftConfig
    from laser_fast.model.distributed import open_world
    from laser_fast.training.sft import sft

    def run(path):
        try:
            if path.endswith("sft.toml"):
                with open_world() as world:
                    sft(SftConfig.load(path), world=world)
            else:
                train_run(load_config(path))
        except ConfigError as error:
            print(f"refused: {error}")

    for path in sys.argv[1:]:
        run_ranks(2, run, path)


if __name__ == "__main__":
    main()
