"""What compilers make is kept between runs, and mixed shapes make them work only a few times."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ideoflow.data.order import draw
from ideoflow.engine.setup import build
from ideoflow.engine.step import TrainingSample, prepare
from ideoflow.engine.warm import grow_memory, keep_compiled
from ideoflow.plan.document import Plan
from ideoflow.recipe import ScheduleSettings

VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither variable set; both as they were afterwards."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def test_compilers_keep_their_work_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unset: None
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("IDEOFLOW_CACHE", str(tmp_path / "cache"))
    keep_compiled()
    for variable in VARIABLES:
        folder = Path(os.environ[variable])
        assert folder.is_dir() and folder.is_relative_to(tmp_path / "cache")
    assert cache_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    triton = pytest.importorskip("triton")
    assert triton.knobs.cache.dir == os.environ["TRITON_CACHE_DIR"]


def test_what_the_user_chose_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unset: None) -> None:
    monkeypatch.setenv("IDEOFLOW_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_compiled()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_a_cache_that_cannot_be_made_is_left_to_the_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unset: None
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IDEOFLOW_CACHE", str(tmp_path / "file"))
    keep_compiled()
    assert not set(VARIABLES) & set(os.environ)


@pytest.mark.parametrize(("platform", "chosen"), [("linux", {}), ("win32", {}), ("linux", {"a": "b"})])
def test_memory_grows_unless_the_user_said_how(
    monkeypatch: pytest.MonkeyPatch, platform: str, chosen: Any
) -> None:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    if chosen:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    monkeypatch.setattr(sys, "platform", platform)
    grow_memory()
    expected = "expandable_segments:True" if platform == "linux" and not chosen else None
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_what_an_engine_compiles_is_in_the_users_cache(tmp_path: Path, unset: None) -> None:
    """In a process of its own, with all that a run imports: libraries must not have chosen before."""
    code = (
        "import ideoflow.engine.session, torch\ntorch.compile(lambda x: (x.sin() * 2).sum())(torch.ones(8))"
    )
    environment = os.environ | {"IDEOFLOW_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    kept = tmp_path / "compiled" / "inductor"
    assert list(kept.rglob("*.so")) and list(kept.glob("fxgraph/**/*"))


def regional(plan: Plan) -> Plan:
    """With compiled blocks; the planner itself compiles for GPUs only."""
    changed = (replace(d, value="regional") if d.id == "compile" else d for d in plan.decisions)
    return replace(plan, decisions=tuple(changed))


def sample(number: int, text: int, grid: tuple[int, int]) -> TrainingSample:
    g = torch.Generator().manual_seed(number)
    latents, words = torch.randn(grid[0] * grid[1], 128, generator=g), torch.randn(text, 192, generator=g)
    return prepare(latents, words, grid, draw(number, *latents.shape, 0, 0.0), ScheduleSettings())


@pytest.mark.slow
def test_a_mixed_data_set_compiles_few_graphs_and_none_once_training_goes(
    plan_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six blocks share one compiled code; what it is guarded on does not depend on the backend's kernels."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    model = build(regional(plan_of(**{"adapter.rank": 4})))
    model.transformer.train()
    graphs = []
    for n in range(26):
        grid = ((4, 4), (4, 6), (3, 5), (8, 2), (5, 5))[n % 5]
        model.gradients([sample(n, (n * 17) % 60, grid)], 1)
        if n == 5:  # sampling has other lengths, and no gradients
            with torch.inference_mode():
                s = sample(n, 30, (6, 6))
                model.predict(s.noisy, s.time, s.text, s.grid)
        graphs.append(counters["stats"]["unique_graphs"])
    # Of one length and of any; the first block's input has no gradient; sampling.
    assert 1 <= graphs[0] <= 2 and graphs[-1] <= 5
    assert graphs[6] == graphs[-1]
    torch._dynamo.reset()
