"""``python -m compressm``: the command line."""

import sys

from compressm.cli import main

sys.exit(main())
