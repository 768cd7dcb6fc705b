"""Keeps the libraries' chatter off the terminal (torch-free)."""

from __future__ import annotations

import logging
import os

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
