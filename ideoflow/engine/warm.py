"""The warm start: what Triton and torch.compile made in one run serves the next.

Both keep compiled kernels in folders of their own choosing, Inductor's under ``/tmp``, where the next boot
or a container's end loses them. They are kept beside the other caches instead.
"""

from __future__ import annotations

import os
import sys

from ideoflow.resources import user_cache

_FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def keep_compiled() -> None:
    """Points the compilers' caches to the user's cache folder, unless their variables are set already.

    A folder that cannot be made leaves a compiler its own choice: it costs time, not the run.
    """
    for variable, name in _FOLDERS.items():
        folder = user_cache() / "compiled" / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        os.environ.setdefault(variable, str(folder))


def grow_memory() -> None:
    """Has torch's allocator grow one segment instead of asking for new ones, unless the user said how.

    Pictures of several shapes otherwise leave gaps that no later tensor fits in: on an H200 capped to 23 GiB,
    20.4 GiB of tensors did not fit. Windows' driver cannot do it. CUDA graphs keep segments of their own.
    """
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
