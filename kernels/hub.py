"""Write laser_kernels as Hugging Face's `kernels` package loads it from the Hub or from a folder.

    python kernels/hub.py ORG/laser-kernels OUT

OUT gets the card, which says how to load it and repeats kernels/README.md, and the package twice:
build/torch-cpu and build/torch-cuda, as "noarch" folders, which hold nothing compiled. Each is the
modules of the package, but

    _ops        names a namespace of its ops that is unique for what the folder holds
    metadata    names that namespace, under which `kernels` imports the folder, as `id`; and name,
                version, license, backend, and the SHA-256 of every other file

Layout and fields: the page "Kernel requirements" of github.com/huggingface/kernels at 8ac69fc, and
`kernels` 0.17.2. A maintainer's script: the installed package has no use for it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "laser-kernels"
# Counts incompatible changes of what the package exports; the Hub's convention keeps 0 for beta.
VERSION = 0
BACKENDS = ("cpu", "cuda")

OPS = '''"""The namespace of the ops of this build."""

NAMESPACE = "{namespace}"


def add_op_namespace_prefix(name: str) -> str:
    """Return the qualified name of an op of this build."""
    return f"{{NAMESPACE}}::{{name}}"
'''

CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
- triton
---

Load it with Hugging Face's [kernels](https://github.com/huggingface/kernels) 0.17 or newer, Python
3.11, PyTorch 2.11 and, on a GPU, Triton 3.6 or newer:

```python
from kernels import get_kernel

laser_kernels = get_kernel("{repo}", version={version}, trust_remote_code=True)
logprobs = laser_kernels.linear_logprob(hidden_states, weight, labels)
```

`impl="cuda"`, which compiles its sources on first use, comes only with `pip install laser-fast`.
What follows is the card of that package; links to files lead into its repository.

"""


def write(out: Path, repo: str) -> None:
    """Write the folder `out`, which is new or empty, for the Hub's repository `repo`.

    Raises:
        ValueError: `out` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: expected a new or empty folder, got files; name another one")
    package = HERE / "laser_kernels"
    modules = {path.name: path.read_bytes() for path in sorted(package.glob("*.py"))}
    for backend in BACKENDS:
        files = dict(modules)
        namespace = f"_{package.name}_{backend}_{_digest(files)}"
        files["_ops.py"] = OPS.format(namespace=namespace).encode()
        metadata = {
            "name": NAME,
            "id": namespace,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": {n: _sha256(b) for n, b in files.items()}},
        }
        files["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
        folder = out / "build" / f"torch-{backend}"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    card = CARD.format(repo=repo, version=VERSION) + (HERE / "README.md").read_text()
    for path in ("README.md", "build/CARD.md"):  # where people, and kernel-builder's upload, look
        (out / path).write_text(card)


def _digest(files: dict[str, bytes]) -> str:
    """Short name of the files' content: another content is another build."""
    lines = "".join(f"{name} {_sha256(content)}\n" for name, content in files.items())
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def _sha256(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def main() -> None:
    """Read the command line and write the folder."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("repo", help="the Hub's repository, which the card names")
    options.add_argument("out", type=Path, help="a new or empty folder")
    arguments = options.parse_args()
    write(arguments.out, arguments.repo)


if __name__ == "__main__":
    main()
