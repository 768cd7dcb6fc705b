"""recipe.lock: the same bytes for the same things, and other bytes for each that is another."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from ideoflow.plan import lock as module
from ideoflow.plan.lock import lock_of, version_changes

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SNAPSHOT = Path(f"/home/me/.cache/huggingface/hub/models--owner--full/snapshots/{COMMIT}")


@pytest.fixture
def plan(plan_for):
    made = plan_for("full", "h200")
    return replace(made, base=replace(made.base, folder=SNAPSHOT))


def test_the_same_run_has_the_same_bytes(plan):
    assert lock_of(plan).to_json() == lock_of(replace(plan)).to_json()


def test_what_decides_nothing_of_it_is_not_in_it(plan):
    elsewhere = replace(plan, name="other", warnings=(), hardware=replace(plan.hardware, free_bytes=1))
    assert lock_of(elsewhere) == lock_of(plan)


def with_tables(plan, table, **values):
    tables = plan.tables
    return replace(plan, tables=replace(tables, **{table: replace(getattr(tables, table), **values)}))


CHANGES = {
    "seed": lambda p: with_tables(p, "train", seed=99),
    "revision": lambda p: with_tables(p, "model", revision="v2"),
    "commit": lambda p: replace(p, base=replace(p.base, folder=SNAPSHOT.with_name("f" * 40))),
    "base": lambda p: replace(p, digests=replace(p.digests, base="0" * 64)),
    "captions": lambda p: replace(p, digests=replace(p.digests, captions="0" * 64)),
    "recipe": lambda p: replace(p, digests=replace(p.digests, recipe="0" * 64)),
    "storage": lambda p: replace(p, base=replace(p.base, storage="fp8")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_one_has_other_bytes(plan, what):
    assert lock_of(CHANGES[what](plan)).to_json() != lock_of(plan).to_json()


@pytest.mark.parametrize(("name", "value"), [("version", lambda _: "9"), ("engine_digest", lambda: "e")])
def test_another_library_or_engine_has_other_bytes(plan, monkeypatch, name, value):
    before = lock_of(plan).to_json()
    monkeypatch.setattr(module, name, value)
    assert lock_of(plan).to_json() != before


def test_a_hub_id_is_resolved_to_its_commit_and_a_folder_is_none(plan):
    assert lock_of(plan).base.commit == COMMIT
    assert lock_of(replace(plan, base=replace(plan.base, folder=Path("/models/full")))).base.commit is None


def test_the_installed_versions_are_in_it(plan):
    versions = lock_of(plan).versions
    assert {name: versions[name] for name in ("torch", "diffusers", "peft")} == {
        name: version(name) for name in ("torch", "diffusers", "peft")
    }
    assert "ideoflow" in versions and "python" in versions


def test_other_versions_are_told_and_nothing_else(plan, tmp_path):
    file, now = tmp_path / "recipe.lock", lock_of(plan)
    assert version_changes(file, now) == []
    file.write_text(now.to_json(), encoding="utf-8")
    assert version_changes(file, replace(now, seed=99)) == []
    (told,) = version_changes(file, replace(now, engine="e", versions={**now.versions, "torch": "9.9"}))
    assert f"torch: {version('torch')} -> 9.9" in told and "engine: " in told and "peft" not in told


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_a_damaged_lock_is_told_and_stops_nothing(plan, tmp_path, text):
    file = tmp_path / "recipe.lock"
    file.write_text(text, encoding="utf-8")
    (told,) = version_changes(file, lock_of(plan))
    assert "cannot be read" in told
