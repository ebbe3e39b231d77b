"""One of the processes that the fixture ``ranks`` starts: ``vlm train`` as some rank, after a change to the program.

It is run by path with these globals: ``environment`` (what a launcher would set), ``log`` (where its output goes),
``change`` (Python that is run first, such as a patch that records gradients), ``arguments`` (those of ``vlm``).
"""

import os
import sys
from pathlib import Path
from typing import Any

environment: dict[str, str]
log: str
change: str
arguments: list[str]


def main(given: dict[str, Any]) -> None:
    os.environ.update(given["environment"])
    with Path(given["log"]).open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    exec(given["change"], {})
    from vlm.commands import main

    sys.exit(main(given["arguments"]))


main(globals())
