"""The benchmarks are run from the checkout; an installed package does not hold them."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
