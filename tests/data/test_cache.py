"""The cache: whole entries or none, whatever stops the process; names that follow everything that counts."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ideoflow.data import cache as module
from ideoflow.data.cache import TensorCache
from ideoflow.data.keys import cache_key
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import data as codes

KEYS = [cache_key("latents", base="b", number=n) for n in range(64)]
KEY = KEYS[0]


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path / "cache")


def put(cache, key, value):
    cache.put(key, value, kind="latents", base="b")


def shards(cache):
    return sorted(p for p in cache.folder.iterdir() if p.suffix == ".safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_comes_back_bit_for_bit(cache, dtype):
    value = torch.randn(5, 7).to(dtype)
    assert KEY not in cache
    put(cache, KEY, value.T)
    assert torch.equal(cache.get(KEY), value.T) and cache.get(KEY).dtype == dtype
    assert KEY in cache and KEY in TensorCache(cache.folder)


def test_entries_share_files_by_what_they_have_in_common(cache):
    for n, key in enumerate(KEYS):
        put(cache, key, torch.full((n + 1, 4 if n % 2 else 8), float(n), dtype=torch.bfloat16))
    cache.flush()
    assert len(shards(cache)) == 2
    assert all(cache.get(k).shape == (n + 1, 4 if n % 2 else 8) for n, k in enumerate(KEYS))


def test_a_shard_is_closed_when_it_is_large_or_old(cache, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 3000)
    for key in KEYS[:10]:
        put(cache, key, torch.zeros(250, 1))
    assert len(shards(cache)) >= 2, "while more is put"
    cache.flush()
    assert len(shards(cache)) == 4
    monkeypatch.setattr(module, "SHARD_SECONDS", 0.0)
    for key in KEYS[10:12]:
        put(cache, key, torch.zeros(1, 1))
    cache.flush()
    assert len(shards(cache)) == 6


def test_what_a_kill_left_an_hour_ago_is_removed_by_the_next_writer(cache):
    cache.folder.mkdir()
    old, new = cache.folder / ".text-old", cache.folder / ".text-being-written"
    old.touch(), new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    put(cache, KEY, torch.zeros(1, 1))
    assert new.exists() and not old.exists()


def test_a_file_is_for_everybody_who_may_read_the_folder(cache):
    put(cache, KEY, torch.zeros(1, 1))
    cache.flush()
    (cache.folder / "plain").touch()
    assert shards(cache)[0].stat().st_mode == (cache.folder / "plain").stat().st_mode


def test_a_damaged_file_is_never_read_and_makes_room(cache):
    value = torch.randn(50, 1)
    put(cache, KEY, value)
    cache.flush()
    content = shards(cache)[0].read_bytes()
    flipped = content[:-20] + bytes([content[-20] ^ 4]) + content[-19:]
    for damage in (b"", content[:7], content[:40], content[:-1], b"\xff" * len(content), flipped):
        shards(cache)[0].write_bytes(damage)
        with pytest.raises(IdeoflowError) as caught:
            cache.get(KEY)
        assert caught.value.diagnostics[0].code is codes.CACHE_LOST
        assert KEY not in cache
        put(cache, KEY, value)
        assert torch.equal(cache.get(KEY), value)
        for file in shards(cache)[:-1]:
            file.unlink()


def test_damage_to_one_entry_spares_its_neighbours(cache):
    values = {key: torch.randn(50, 1) for key in KEYS[:4]}
    for key, value in values.items():
        put(cache, key, value)
    cache.flush()
    content = bytearray(shards(cache)[0].read_bytes())
    content[cache.index.find(KEYS[2]).begin] ^= 1
    shards(cache)[0].write_bytes(content)
    with pytest.raises(IdeoflowError):
        cache.get(KEYS[2])
    assert cache.missing(KEYS[:4]) == [False, False, True, False]
    assert all(torch.equal(cache.get(k), values[k]) for k in (KEYS[0], KEYS[1], KEYS[3]))


def test_an_entry_that_another_process_moved_is_found(cache):
    put(cache, KEY, torch.ones(2, 2))
    cache.flush()
    (shard,) = cache.index.shards
    assert module.rewrite_shard(cache.folder, shard) == (1, 0)
    assert torch.equal(cache.get(KEY), torch.ones(2, 2))


def test_a_lost_file_is_told(cache):
    with pytest.raises(IdeoflowError) as caught:
        cache.get(KEY)
    assert caught.value.diagnostics[0].code is codes.CACHE_LOST


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    cache = TensorCache(tmp_path / "file" / "cache")
    with pytest.raises(IdeoflowError) as caught:
        put(cache, KEY, torch.zeros(1, 1))
        cache.flush()
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code is codes.CACHE_UNWRITABLE and "cache.folder" in diagnostic.cure


def _write_forever(folder, seed, delay):
    torch.set_num_threads(1)
    module.SHARD_BYTES = 1 << 20
    cache = TensorCache(Path(folder))
    os.kill(os.getppid(), signal.SIGUSR1)
    while True:
        for key in KEYS:
            put(cache, key, torch.full((50_000, 1), float(KEYS.index(key))))
            time.sleep(delay)


def test_readers_meet_whole_values_while_writers_are_killed(cache):
    """Two processes write the same entries over and over and are killed in the middle of it."""
    for n, key in enumerate(KEYS):
        put(cache, key, torch.full((50_000, 1), float(n)))
    cache.flush()
    context = multiprocessing.get_context("fork")
    ready = []
    before = signal.signal(signal.SIGUSR1, lambda *_: ready.append(1))
    try:
        for delay in (0.0, 0.001):
            ready.clear()
            writers = [
                context.Process(target=_write_forever, args=(str(cache.folder), n, delay)) for n in (1, 2)
            ]
            for writer in writers:
                writer.start()
            while not ready:
                time.sleep(0.01)
            end = time.monotonic() + 0.3
            reader = TensorCache(cache.folder)
            while time.monotonic() < end:
                reader.index.refresh()
                for n, key in enumerate(KEYS[::16]):
                    assert (reader.get(key) == 16.0 * n).all()
            for writer in writers:
                os.kill(writer.pid, signal.SIGKILL)
                writer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    after = TensorCache(cache.folder)
    assert after.index.damaged == [] and len(after.index) == len(KEYS)
    assert all((after.get(key) == float(n)).all() for n, key in enumerate(KEYS))
