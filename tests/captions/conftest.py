"""Lets the tests of this folder import its helpers: ``verifier`` and ``caption_strategies``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
