"""``python -m ideoflow``."""

import sys

from ideoflow.cli import main

sys.exit(main())
