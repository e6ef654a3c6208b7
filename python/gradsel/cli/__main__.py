"""``python -m gradsel.cli``."""

import sys

from gradsel.cli.main import main

sys.exit(main())
