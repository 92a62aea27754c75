"""``python -m compressm``: the command line."""

from compressm.cli import leave, main

leave(main())
