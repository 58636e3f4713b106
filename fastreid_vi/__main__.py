"""`python -m fastreid_vi`: the command line."""

import os
import sys

from fastreid_vi.cli import main

code = main()
if "TORCHELASTIC_RUN_ID" in os.environ and "torch" in sys.modules:
    from fastreid_vi.train.distributed import leave

    leave(code)
sys.exit(code)
