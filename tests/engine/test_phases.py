"""Each phase of a run holds only what it needs, and leaves nothing behind."""

import gc
import shutil

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Ideogram4Transformer2DModel

from ideoflow.engine.events import StageDone
from ideoflow.model.text import TextEncoder
from ideoflow.resources import recipes
from ideoflow.workflow import prepare, run


def alive():
    """How many of each model there are, wherever a reference may be left."""
    gc.collect()
    kinds = (TextEncoder, AutoencoderKLFlux2, Ideogram4Transformer2DModel)
    found = [type(o) for o in gc.get_objects() if isinstance(o, kinds)]
    return tuple(found.count(kind) for kind in kinds)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("IDEOFLOW_CACHE", str(tmp_path / "cache"))  # so that everything is encoded here
    (tmp_path / "pictures").mkdir()
    shutil.copy(recipes() / "quickstart" / "coffee.jpg", tmp_path / "pictures")
    (tmp_path / "pictures" / "coffee.icap").write_text("A photograph of a cup of coffee.\n")
    (tmp_path / "prompt.icap").write_text("A photograph of a cup of tea.\n")
    file = tmp_path / "phases.toml"
    file.write_text(
        '[model]\nbase = "nano"\n[data]\nimages = "pictures"\nresolution = 64\n'
        '[validate]\nprompts = ["prompt.icap"]\nsteps = 1\n'
        f'[train]\nsteps = 2\n[output]\nfolder = "{tmp_path / "out"}"\n'
    )
    return file


def test_every_phase_holds_only_its_own(recipe):
    before, seen = alive(), {}

    def watch(event):
        if isinstance(event, StageDone) and event.stage not in seen:
            seen[event.stage] = tuple(now - then for now, then in zip(alive(), before, strict=True))

    run(prepare(recipe), on_event=watch)
    # Text encoders, autoencoders, transformers; samples are made with a second transformer.
    assert seen["captions"] == seen["pictures"] == (0, 0, 0)
    assert seen["load"] == seen["train"] == seen["samples"] == (0, 1, 2)
    assert alive() == before


@pytest.mark.gpu
def test_the_gpu_is_left_as_it_was_found(recipe):
    torch.cuda.empty_cache()
    before, seen = torch.cuda.memory_allocated(), {}

    def watch(event):
        if isinstance(event, StageDone):
            seen[event.stage] = torch.cuda.memory_allocated() - before

    run(prepare(recipe), on_event=watch)
    gc.collect()
    assert max(seen["captions"], seen["pictures"]) < 1 << 20
    assert torch.cuda.memory_allocated() - before < 16 << 20  # cuBLAS keeps its workspace
