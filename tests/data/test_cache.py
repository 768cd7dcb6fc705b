"""The cache: whole entries or none, whatever stops the process; names that follow everything that counts."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ideoflow.data.cache import TensorCache, cache_key
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import data as codes

KEY = cache_key("latents", base="b", size=(64, 96))


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path / "cache")


def file_of(cache, key=KEY):
    (file,) = (p for p in cache.folder.rglob("*") if p.is_file() and key in p.name)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_comes_back_bit_for_bit(cache, dtype):
    value = torch.randn(5, 7).to(dtype)
    assert KEY not in cache
    cache.put(KEY, value.T)
    assert KEY in cache
    assert torch.equal(cache.get(KEY), value.T) and cache.get(KEY).dtype == dtype


def test_a_damaged_file_is_never_read_and_makes_room(cache):
    value = torch.randn(50)
    cache.put(KEY, value)
    content = file_of(cache).read_bytes()
    for damage in (b"", content[:7], content[:40], content[:-1], content + b"x", b"\xff" * len(content)):
        file_of(cache).write_bytes(damage)
        with pytest.raises(IdeoflowError) as caught:
            cache.get(KEY)
        assert caught.value.diagnostics[0].code is codes.CACHE_LOST
        assert KEY not in cache
        cache.put(KEY, value)
        file_of(cache).write_bytes(damage)
        assert KEY not in cache, "found without being read"
        cache.put(KEY, value)
        assert torch.equal(cache.get(KEY), value)


def test_a_lost_file_is_told(cache):
    with pytest.raises(IdeoflowError) as caught:
        cache.get(KEY)
    assert caught.value.diagnostics[0].code is codes.CACHE_LOST


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IdeoflowError) as caught:
        TensorCache(tmp_path / "file").put(KEY, torch.zeros(1))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code is codes.CACHE_UNWRITABLE and "IDEOFLOW_CACHE" in diagnostic.cure


def test_the_key_changes_with_each_fact():
    facts = {
        "base": "b",
        "dtype": "float32",
        "size": (64, 96),
        "window": (0.0, 0.5, 64.0, 96.0),
        "pixels": "p",
    }
    changed = {
        "base": "c",
        "dtype": "bfloat16",
        "size": (96, 64),
        "window": (0.0, 0.5, 64.0, 95.9),
        "pixels": "q",
    }
    keys = {cache_key("latents", **facts), cache_key("text", **facts)}
    keys |= {cache_key("latents", **{**facts, name: value}) for name, value in changed.items()}
    assert len(keys) == 2 + len(facts)
    assert cache_key("latents", **dict(reversed(facts.items()))) == cache_key("latents", **facts)


def _write_forever(folder, seed):
    torch.set_num_threads(1)
    cache = TensorCache(Path(folder))
    while True:
        cache.put(KEY, torch.full((200_000,), float(seed)))


def test_readers_meet_whole_values_while_writers_are_killed(cache):
    """Two processes write the same entry over and over and are killed in the middle of it."""
    cache.put(KEY, torch.zeros(200_000))
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        writers = [context.Process(target=_write_forever, args=(str(cache.folder), n)) for n in (1, 2)]
        for writer in writers:
            writer.start()
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            value = cache.get(KEY)
            assert value.shape == (200_000,) and len(value.unique()) == 1
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        assert KEY in cache and len(cache.get(KEY).unique()) == 1
