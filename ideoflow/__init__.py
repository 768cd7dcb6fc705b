"""ideoflow: declarative LoRA fine-tuning for Ideogram 4.

The public API is what the command line itself calls, and nothing deeper is promised::

    load_recipe, make_plan, run                      # recipe -> plan -> trained adapter
    compile_caption, decompile_caption, check_captions   # the caption language

Names are imported on first use, so that ``import ideoflow`` costs nothing and torch is only
loaded by ``run``.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "load_recipe": "ideoflow.recipe",
    "make_plan": "ideoflow.plan",
    "run": "ideoflow.workflow",
    "compile_caption": "ideoflow.captions",
    "decompile_caption": "ideoflow.captions",
    "check_captions": "ideoflow.captions",
    "Diagnostic": "ideoflow.diagnostics",
    "IdeoflowError": "ideoflow.diagnostics",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ideoflow' has no attribute {name!r}")
