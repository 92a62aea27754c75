"""``python -m compressm.cli``: the command line."""

from compressm.cli import leave, main

leave(main())
