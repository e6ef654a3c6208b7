"""``python -m gradsel``."""

import sys

from gradsel.cli.main import main

sys.exit(main())
