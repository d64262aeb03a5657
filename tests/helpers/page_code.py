"""Code blocks of a page, for tests that run what users read."""

import re
from pathlib import Path


def code_blocks(path, section, language="python"):
    """Blocks of one language below a heading (without its #s), up to the next of any level."""
    text = "\n" + Path(path).read_text()
    assert text.count(f"# {section}\n") == 1
    text = re.split(r"\n#+ ", text.partition(f"# {section}\n")[2])[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)
