"""Keeps the libraries' chatter off the terminal, and tells which of them is missing (torch-free)."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import Any

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.model import NO_LIBRARY

# Each of these warns at import about optional parts that ideoflow does not use: torchao's CUDA extensions on
# a CPU, bitsandbytes' optional CPU kernels, diffusers' optional torchao tensors.
_TALKERS = ("torchao", "torch.utils._pytree", "bitsandbytes", "diffusers", "transformers", "peft")


def hush_libraries() -> None:
    """Lets only errors of the libraries through; call before torch is imported."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def disable_progress_bars() -> None:
    """Turns off diffusers' and transformers' own bars for loading and saving; imports both."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def import_library(name: str, needed_for: str) -> Any:
    """A library that only some runs need.

    Raises:
        IdeoflowError: when it is not installed, or breaks while it is imported.
    """
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            _broken(package, needed_for, error)
        cure = f"pip install {package}"
        fail(NO_LIBRARY, f"{needed_for} needs {package}, which is not installed", cure=cure)
    except Exception as error:  # whatever a half-installed native library raises
        _broken(package, needed_for, error)


def _broken(package: str, needed_for: str, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    cure = f"pip install --force-reinstall {package}"
    fail(NO_LIBRARY, f"{needed_for} needs {package}, which cannot be imported: {reason}", cure=cure)
