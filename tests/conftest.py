"""Before any test: few threads, no network, a cache of their own, and GPU tests only where there is a GPU."""

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

# The tests run in several processes (pytest -n 2); each would otherwise take every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# What Inductor compiles here is small: probing the processor for vector instructions and starting a pool of
# processes would take longer.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Triton reads this once, when anything first imports it: without a GPU its kernels run in its interpreter.
if not any(os.path.exists(f"/dev/nvidia{n}") for n in range(16)):  # noqa: PTH110
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.append(str(Path(__file__).parent))  # for nano_runs

_cache = tempfile.TemporaryDirectory(prefix="ideoflow-tests-")
# Worker processes inherit the variable, so that all of them share one cache and it ends with the run.
os.environ.setdefault("IDEOFLOW_CACHE", _cache.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Long tests first: one that starts last would leave the other workers waiting.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch  # only here: most of the tests need no torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    # Every run collects garbage between its phases: half a second each time among all that is imported.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries that count what they leave behind complain otherwise
