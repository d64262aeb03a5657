"""`python -m laser_fast` and `torchrun -m laser_fast`."""

from laser_fast.cli import main

if __name__ == "__main__":
    main()
