"""The kernels inside other trainers."""

import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import distributions
from typing import Any


def check_host(package: str, tested: str, signatures: dict[Callable[..., Any], str]) -> None:
    """Warn of a version of a host that was not tested, and refuse functions that are not as tested.

    Args:
        package: Its name as a distribution.
        tested: What the tested versions begin with, as "0.9".
        signatures: Function that the integration replaces or calls -> names of its parameters.
    """
    versions = [d.version for d in distributions(name=package)]
    found_version = versions[0] if versions else "a checkout"
    for function, expected in signatures.items():
        found = " ".join(inspect.signature(function).parameters)
        if found != expected:
            raise ImportError(
                f"laser_fast.integrations: expected {function.__qualname__}({expected}) of "
                f"{package} {tested}, got ({found}) of {found_version}; install {package} {tested}"
            )
    if not f"{found_version}.".startswith(f"{tested}."):
        warnings.warn(
            f"laser_fast.integrations: tested with {package} {tested}, got {found_version}; first "
            "compare its log-probs with and without laser_kernels",
            stacklevel=3,
        )


def refuse(where: str, options: dict[str, Any]) -> None:
    """Raise a ValueError that names what is there and cannot be honoured."""
    if found := [name for name, is_there in options.items() if is_there]:
        raise ValueError(f"{where} does not support {', '.join(found)}; leave it out")
