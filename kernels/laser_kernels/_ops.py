"""The namespace of the ops: every copy of the package that a process loads has its own.

Of two ops of one name torch runs the later, also for callers of the first. Installed, the namespace
is `laser_kernels`. A copy under another module name adds its folder: that name may change from
process to process, and graphs are cached by names of ops. A build for Hugging Face's `kernels` has
a file of its own in place of this one, which kernels/hub.py writes.
"""

from __future__ import annotations

import hashlib
import os

NAMESPACE = "laser_kernels"
if __package__ != NAMESPACE:
    _folder = os.path.dirname(os.path.realpath(__file__))
    NAMESPACE += "_" + hashlib.sha256(_folder.encode()).hexdigest()[:8]


def add_op_namespace_prefix(name: str) -> str:
    """Return the qualified name of an op of this copy."""
    return f"{NAMESPACE}::{name}"
