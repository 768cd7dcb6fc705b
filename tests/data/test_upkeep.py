"""Statistics, verification and pruning: what is wanted stays, readable throughout; the rest goes."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from ideoflow.data import cache as cache_module
from ideoflow.data.cache import TensorCache
from ideoflow.data.keys import Keys, cache_key
from ideoflow.data.survey import read_dataset
from ideoflow.data.upkeep import keys_of_recipe, prune, stats, verify
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import data as codes

KEYS = [cache_key("text", number=n) for n in range(40)]


def fill(folder, numbers, base="b", kind="text"):
    """One shard; entry n holds n + 1 rows of the number n."""
    cache = TensorCache(folder)
    for n in numbers:
        cache.put(KEYS[n], torch.full((n + 1, 4), float(n)), kind=kind, base=base)
    cache.flush()


def present(folder):
    cache = TensorCache(folder)
    there = {n for n, gone in enumerate(cache.missing(KEYS)) if not gone}
    assert all(torch.equal(cache.get(KEYS[n]), torch.full((n + 1, 4), float(n))) for n in there)
    return there


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def age(file, days):
    then = time.time() - days * 86400
    os.utime(file, (then, then))


def flip_a_bit(folder, key):
    place = TensorCache(folder).index.find(key)
    content = bytearray((folder / place.shard.name).read_bytes())
    content[place.begin] ^= 1
    (folder / place.shard.name).write_bytes(content)


def test_statistics_count_what_is_there(tmp_path):
    assert stats(tmp_path / "nothing").holdings == ()
    fill(tmp_path, range(10))
    fill(tmp_path, range(5, 15))
    fill(tmp_path, range(20, 23), base="c", kind="latents")
    (tmp_path / ("text-x.safetensors")).write_bytes(b"damaged")
    (tmp_path / ".scratch").touch()
    age(tmp_path / ".scratch", 1)
    found = stats(tmp_path)
    rows = [(h.kind, h.base, h.dtype, h.entries, h.duplicates, h.shards) for h in found.holdings]
    assert rows == [("latents", "c", "F32", 3, 0, 1), ("text", "b", "F32", 15, 5, 2)]
    assert sum(h.bytes for h in found.holdings) == sum(p.stat().st_size for p in shards(tmp_path)) - 7
    assert found.damaged == ("text-x.safetensors",) and found.leftovers == 1
    assert found.index_bytes == 32 * 23


def test_verifying_finds_every_damage_and_repairing_spares_the_rest(tmp_path):
    fill(tmp_path, range(10))
    fill(tmp_path, range(10, 20))
    assert verify(tmp_path).good and verify(tmp_path).entries == 20
    flip_a_bit(tmp_path, KEYS[3])
    flip_a_bit(tmp_path, KEYS[17])
    (tmp_path / "text-x.safetensors").write_bytes(b"damaged")
    found = verify(tmp_path)
    assert sorted(found.damaged.values()) == [1, 1] and found.unreadable == ("text-x.safetensors",)
    assert not found.good
    verify(tmp_path, repair=True)
    assert present(tmp_path) == set(range(20)) - {3, 17} and verify(tmp_path).good


def test_pruning_by_wish(tmp_path):
    fill(tmp_path, range(10))
    fill(tmp_path, range(10, 20))
    fill(tmp_path, range(20, 30), base="c")
    keep = [KEYS[n] for n in (1, 2, 15, 39)]
    before = shards(tmp_path)
    would = prune(tmp_path, keep=keep, dry_run=True)
    assert shards(tmp_path) == before and present(tmp_path) == set(range(30))
    assert prune(tmp_path, keep=keep) == would
    assert (would.entries, would.merged) == (27, 3)
    assert present(tmp_path) == {1, 2, 15} and len(shards(tmp_path)) == 1
    assert prune(tmp_path, keep=[]).entries == 3 and shards(tmp_path) == []


def test_pruning_by_age(tmp_path):
    for start in range(0, 30, 10):
        fill(tmp_path, range(start, start + 10))
    for file, days in zip(shards(tmp_path), (100, 40, 1), strict=True):
        age(file, days)
    assert prune(tmp_path, unused_days=50).entries == 10
    assert present(tmp_path) == set(range(10, 30))
    for file in shards(tmp_path):
        age(file, 100)
    TensorCache(tmp_path).missing(KEYS[10:12])  # a run that needs two of them
    assert prune(tmp_path, unused_days=50).entries == 0


def test_wishes_and_age_together(tmp_path):
    fill(tmp_path, range(10))
    fill(tmp_path, range(10, 20))
    age(shards(tmp_path)[0], 100)
    prune(tmp_path, keep=[KEYS[4]], unused_days=50)
    assert present(tmp_path) == {4, *range(10, 20)}


def test_pruning_without_a_wish_only_tidies(tmp_path, monkeypatch):
    fill(tmp_path, range(10))
    fill(tmp_path, range(5, 15))
    fill(tmp_path, range(20, 22))
    (tmp_path / ".old").touch()
    age(tmp_path / ".old", 1)
    (tmp_path / ".being-written").touch()
    done = prune(tmp_path)
    assert (done.entries, done.leftovers) == (5, 1)
    assert len(shards(tmp_path)) == 1 and present(tmp_path) == {*range(15), 20, 21}
    assert (tmp_path / ".being-written").exists() and not (tmp_path / ".old").exists()
    assert prune(tmp_path).merged == 0, "nothing is left to do"


def test_large_shards_are_left_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1000)
    fill(tmp_path, range(30))
    before = shards(tmp_path)
    assert len(before) > 4
    prune(tmp_path)
    assert set(shards(tmp_path)) >= set(before[1:-1])
    assert present(tmp_path) == set(range(30))


def test_a_reader_of_what_is_pruned_goes_on(tmp_path):
    fill(tmp_path, range(10))
    fill(tmp_path, range(10, 20))
    reader = TensorCache(tmp_path)
    prune(tmp_path)
    assert all((reader.get(KEYS[n]) == float(n)).all() for n in range(20))


def test_a_prune_that_is_killed_loses_nothing_that_stays(tmp_path):
    context = multiprocessing.get_context("fork")
    chance = random.Random(1)
    wanted = {n for n in range(40) if n % 3}
    for start in range(0, 40, 2):
        fill(tmp_path, range(start, min(start + 3, 40)))
    for _ in range(8):
        process = context.Process(target=prune, args=(tmp_path,), kwargs={"keep": [KEYS[n] for n in wanted]})
        process.start()
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert wanted <= present(tmp_path) and verify(tmp_path).good
    prune(tmp_path, keep=[KEYS[n] for n in wanted])
    assert present(tmp_path) == wanted and len(shards(tmp_path)) == 1


def test_a_folder_that_may_not_be_changed(tmp_path, monkeypatch):
    fill(tmp_path, range(3))
    flip_a_bit(tmp_path, KEYS[1])

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache_module, "rewrite_shard", refuse)
    with pytest.raises(IdeoflowError) as caught:
        verify(tmp_path, repair=True)
    assert caught.value.diagnostics[0].code is codes.CACHE_UNWRITABLE


def test_the_keys_of_a_recipe_are_those_of_its_samples(folder, picture, recipe, nano_base):
    for n in range(2):
        picture(64, 64, seed=n).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    file = folder.parent / "r.toml"
    file.write_text(recipe("", "[captions]\nmax_tokens = 99").text)
    found = keys_of_recipe(file)
    samples = read_dataset(recipe("", "[captions]\nmax_tokens = 99")).samples
    for dtype in ("float32", "bfloat16"):
        assert {Keys.of(nano_base, dtype, 99).caption(s.caption) for s in samples} <= found
    assert len(found) == 8
