"""The index over shards: what the headers say, whoever wrote them, and however the folder changes."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ideoflow.data import cache, shards
from ideoflow.data.cache import read_entry, rewrite_shard, write_shard
from ideoflow.data.keys import cache_key
from ideoflow.data.shards import Index, join_keys, read_shard, split_keys

KEYS = [cache_key("latents", number=n) for n in range(60)]


def write(folder, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return write_shard(folder, "latents", "b", {k: torch.randn(3, 4, generator=generator) for k in keys})[0]


def index_of(folder):
    index = Index(folder)
    index.refresh()
    return index


@given(st.lists(st.integers(0, 2**128 - 1), max_size=20))
def test_keys_are_split_and_joined(numbers):
    keys = [f"{n:032x}" for n in numbers]
    high, low = split_keys(keys)
    assert join_keys({"high": high, "low": low}) == keys


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 2**128 - 1), min_size=1, max_size=12), max_size=5),
    st.lists(st.integers(0, 2**128 - 1), max_size=10),
)
def test_it_finds_what_a_dictionary_finds(tmp_path_factory, groups, others):
    folder = tmp_path_factory.mktemp("index")
    truth: dict[str, str] = {}
    for group in groups:
        keys = [f"{n:032x}" for n in group]
        name = write(folder, keys).name
        for key in keys:
            truth.setdefault(key, name)  # the older shard is read
    index = index_of(folder)
    asked = list(truth) + [f"{n:032x}" for n in others]
    assert index.has(asked).tolist() == [key in truth for key in asked]
    for key in asked:
        place = index.find(key)
        assert (place and place.shard.name) == truth.get(key)
    assert len(index) == len(truth)


def test_keys_that_share_half_their_digits():
    pairs = [f"{7:016x}{n:016x}" for n in range(5)]
    rows = shards._empty(5)
    rows["high"], rows["low"] = split_keys(pairs)
    index = Index(None)
    index._take([(shards.Shard("s", 1, "latents", "b", "F32", 4, 5), rows)])
    assert index.has([*pairs, f"{7:016x}{9:016x}"]).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("count", "rows", "most_room"),
    [(60, 3, 1 << 20), (6, 1 << 17, 1 << 15), (60, 3, 1 << 10), (1, 1, 1 << 20)],
)
def test_safetensors_reads_what_is_written(tmp_path, count, rows, most_room, monkeypatch):
    """With the room for the header left as it was, taken away from a small shard, and too small."""
    from safetensors import safe_open

    monkeypatch.setattr(cache, "_LARGEST_ROOM", most_room)
    generator = torch.Generator().manual_seed(0)
    values = {k: torch.randn(rows + n, 4, generator=generator) for n, k in enumerate(KEYS[:count])}
    shard, _ = write_shard(tmp_path, "latents", "b", values)
    with safe_open(tmp_path / shard.name, "pt") as truth:
        assert all(torch.equal(truth.get_tensor(k), values[k]) for k in values)
        assert set(truth.keys()) == set(values)
        assert truth.metadata()["kind"] == "latents" and truth.metadata()["base"] == "b"
    index = index_of(tmp_path)
    assert all(torch.equal(read_entry(tmp_path, index.find(k)), values[k]) for k in values)
    assert (shard.entries, shard.columns, shard.dtype, shard.kind) == (count, 4, "F32", "latents")
    data = sum(v.nbytes for v in values.values())
    assert data < shard.size < 1.02 * data + 250 * count + 250


def test_an_index_follows_its_folder(tmp_path):
    index = index_of(tmp_path / "not there yet")
    assert len(index) == 0 and index.find(KEYS[0]) is None and not index.has(KEYS).any()
    index = index_of(tmp_path)
    first = write(tmp_path, KEYS[:20])
    index.refresh()
    assert index.has(KEYS).tolist() == [True] * 20 + [False] * 40
    write(tmp_path, KEYS[10:40], seed=1)
    index.refresh()
    assert index.has(KEYS).tolist() == [True] * 40 + [False] * 20
    assert index.find(KEYS[15]).shard == first
    (tmp_path / first.name).unlink()
    index.refresh()
    assert len(index.shards) == 1
    # Entries that lay in both are now read from the other.
    assert index.has(KEYS).tolist() == [False] * 10 + [True] * 30 + [False] * 20


def test_own_shards_are_known_at_once_and_folded_in(tmp_path, monkeypatch):
    index = index_of(tmp_path)
    for start in range(0, 60, 20):
        shard, rows = write_shard(
            tmp_path, "text", "b", {k: torch.zeros(1, 2) for k in KEYS[start : start + 20]}
        )
        index.add(shard, rows)
        assert index.find(KEYS[start]).shard == shard
    assert index.has(KEYS).all() and len(index) == 60
    assert {k: index.find(k) for k in KEYS} == {k: index_of(tmp_path).find(k) for k in KEYS}
    index.refresh()
    assert len(index.shards) == 3


@pytest.mark.parametrize("damage", [b"", b"short", b"\xff" * 400, "cut", "longer"])
def test_a_damaged_shard_is_named_and_its_entries_are_missing(tmp_path, damage):
    good, bad = write(tmp_path, KEYS[:5]), write(tmp_path, KEYS[5:9])
    content = (tmp_path / bad.name).read_bytes()
    damage = {"cut": content[:-1], "longer": content + b"x"}.get(damage, damage)
    (tmp_path / bad.name).write_bytes(damage)
    index = index_of(tmp_path)
    assert index.damaged == [bad.name] and [s.name for s in index.shards] == [good.name]
    assert index.has(KEYS[:9]).tolist() == [True] * 5 + [False] * 4


def test_a_shard_of_another_format_is_none(tmp_path, monkeypatch):
    shard = write(tmp_path, KEYS[:2])
    monkeypatch.setattr(shards, "FORMAT", 99)
    with pytest.raises(ValueError, match="format 99"):
        read_shard(tmp_path / shard.name)


def test_a_snapshot_is_only_a_short_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SNAPSHOT_AFTER", 3)
    written = [write(tmp_path, KEYS[n : n + 10]) for n in range(0, 40, 10)]
    truth = index_of(tmp_path)
    snapshot = tmp_path / "index.npz"
    assert snapshot.exists() and len(truth) == 40

    read = []
    monkeypatch.setattr(shards, "read_shard", lambda file: read.append(file.name) or read_shard(file))
    again = index_of(tmp_path)
    assert read == [] and all(np.array_equal(again.rows[n], truth.rows[n]) for n in truth.rows)

    # What changed since it was written counts, and the snapshot does not.
    (tmp_path / written[0].name).unlink()
    new = write(tmp_path, KEYS[40:50])
    os.truncate(tmp_path / written[1].name, 100)
    changed = index_of(tmp_path)
    assert sorted(read) == sorted([new.name, written[1].name]) and changed.damaged == [written[1].name]
    assert changed.has(KEYS).tolist() == [False] * 20 + [True] * 30 + [False] * 10
    assert changed.find(KEYS[45]).shard == new

    for content in (b"", snapshot.read_bytes()[:200], b"PK\x03\x04" + bytes(100)):
        snapshot.write_bytes(content)
        assert index_of(tmp_path).has(KEYS).tolist() == changed.has(KEYS).tolist()


def test_rewriting_keeps_what_is_good_and_wanted(tmp_path):
    shard = write(tmp_path, KEYS[:10])
    index = index_of(tmp_path)
    values = {k: read_entry(tmp_path, index.find(k)) for k in KEYS[:10]}
    content = bytearray((tmp_path / shard.name).read_bytes())
    content[index.find(KEYS[3]).begin + 5] ^= 1
    (tmp_path / shard.name).write_bytes(content)
    assert rewrite_shard(tmp_path, shard, keep=set(KEYS[:6])) == (5, 1)
    assert not (tmp_path / shard.name).exists()
    index.refresh()
    assert index.has(KEYS[:10]).tolist() == [n != 3 and n < 6 for n in range(10)]
    assert all(torch.equal(read_entry(tmp_path, index.find(k)), values[k]) for k in KEYS[:3])
    (left,) = index.shards
    assert rewrite_shard(tmp_path, left, keep=set()) == (0, 0)
    assert list(tmp_path.iterdir()) == []
