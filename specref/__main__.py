"""``python -m specref`` is the command line."""

import sys

from specref.cli import main

sys.exit(main())
