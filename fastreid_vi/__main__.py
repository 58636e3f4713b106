"""`python -m fastreid_vi`: the command line."""

import sys

from fastreid_vi.cli import main

sys.exit(main())
