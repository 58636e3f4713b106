"""`python -m fastreid_vi` and the console script: the command line as a process of its own."""

import os
import sys
from typing import NoReturn

from fastreid_vi.cli import main


def run() -> NoReturn:
    """Run the command that the process was started with, and end the process."""
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ and "torch" in sys.modules:
        from fastreid_vi.train.distributed import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
