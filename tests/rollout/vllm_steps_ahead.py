"""Run by test_vllm_server_ahead.py in a process of its own: trains, and watches the correction.

Prints one JSON line: the smallest and the largest importance weight of every loss call.
"""

import json
import sys

from laser_fast.cli import train_run
from laser_fast.config import load_config
from laser_fast.training import objective


def main(path):
    seen = []
    importance_weights = objective.importance_weights

    def spy(*arguments, **options):
        weights = importance_weights(*arguments, **options)
        seen.append((weights.min().item(), weights.max().item()))
        return weights

    objective.importance_weights = spy
    train_run(load_config(path))
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
