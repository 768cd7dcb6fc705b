"""Filling the caches on one process and on several: everything once, and what fails is told by all."""

import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from ideoflow.data import keys, memory
from ideoflow.data.upkeep import keys_of_recipe, stats, verify
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import data as codes
from ideoflow.engine.caches import build_caches
from ideoflow.resources import recipes
from ideoflow.workflow import build_cache, prepare


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe over six pictures, two forms of each caption, with a cache of its own."""
    shutil.copytree(recipes() / "styles", tmp_path / "styles")
    (tmp_path / "pictures").mkdir()
    for picture in sorted((recipes() / "quickstart").glob("*.jpg"))[:6]:
        shutil.copy(picture, tmp_path / "pictures")
        words = f"A picture of {picture.stem}.\nobj: One thing.\nobj: Another thing.\nobj: A third.\n"
        (tmp_path / "pictures" / f"{picture.stem}.icap").write_text(words)
    file = tmp_path / "r.toml"
    file.write_text(
        '[model]\nbase = "nano"\n[data]\nimages = "pictures"\nresolution = 64\n[captions]\nshuffle = true\n'
        f'variants = 2\n[cache]\nfolder = "{tmp_path / "cache"}"\n'
    )
    return file


def entries(folder):
    return {h.kind: (h.entries, h.duplicates) for h in stats(folder / "cache").holdings}


def test_everything_is_encoded_once(recipe):
    news = []
    built = build_cache(prepare(recipe), on_event=news.append)
    assert (built.captions, built.pictures, built.processes) == (12, 6, 1)
    assert (built.encoded.captions, built.encoded.pictures) == (12, 6)
    assert entries(recipe.parent) == {"latents": (6, 0), "text": (12, 0)}
    assert [e.stage for e in news if type(e).__name__ == "StageDone"] == ["captions", "pictures"]
    again = build_cache(prepare(recipe))
    assert (again.captions, again.pictures, again.encoded.captions, again.encoded.pictures) == (12, 6, 0, 0)
    needed = keys_of_recipe(recipe)
    assert len(needed) == 2 * 18, "in both types"


def _one_of(rank, ranks, port, recipe, results):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    prepared = prepare(recipe)
    try:
        results.put(build_caches(prepared.plan, prepared.dataset, prepared.prompts, lambda _: None))
    except IdeoflowError as error:
        results.put([d.code.id for d in error.diagnostics])


def build_with(ranks, recipe):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_one_of, args=(r, ranks, port, recipe, results)) for r in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return found


def test_two_processes_share_the_work_and_agree_on_it(recipe):
    first, second = build_with(2, recipe)
    assert (first.captions, first.pictures, first.processes) == (12, 6, 2)
    assert first.encoded == second.encoded and (first.encoded.captions, first.encoded.pictures) == (12, 6)
    assert entries(recipe.parent) == {"latents": (6, 0), "text": (12, 0)}
    assert verify(recipe.parent / "cache").good
    assert build_cache(prepare(recipe)).encoded.pictures == 0


def test_one_bad_picture_does_not_stop_the_others(recipe):
    picture = sorted((recipe.parent / "pictures").glob("*.jpg"))[2]
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    assert build_with(2, recipe) == [[codes.BAD_PICTURE.id]] * 2
    assert entries(recipe.parent) == {"latents": (5, 0), "text": (12, 0)}
    picture.write_bytes(content)
    assert build_cache(prepare(recipe)).encoded.pictures == 1


def test_two_processes_read_each_picture_once_for_its_digest(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_RACY_NS", -(10**9))  # files that were just made are remembered
    plain = keys.picture_digest

    def noting(picture):
        with (tmp_path / "read").open("a") as log:
            log.write(f"{picture.name}\n")
        return plain(picture)

    monkeypatch.setattr(keys, "picture_digest", noting)
    build_with(2, recipe)
    names = (tmp_path / "read").read_text().split()
    assert sorted(names) == sorted(p.name for p in (recipe.parent / "pictures").glob("*.jpg"))
