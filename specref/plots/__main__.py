"""``python -m specref.plots``: draw the landing page's figure and table."""

from specref.plots.result import main

raise SystemExit(main())
