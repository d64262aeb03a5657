"""`laser-fast`, `python -m laser_fast` and `torchrun -m laser_fast`."""

import os
import sys

from laser_fast import MissingExtraError, needs_train


def main() -> None:
    """Run the command line; without the trainer's packages, one sentence and exit code 2."""
    try:
        with needs_train():
            from laser_fast.cli import main as run

            run()
    except MissingExtraError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
