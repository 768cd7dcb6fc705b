"""``ideoflow cache``: what it prints, its exit codes, and what it leaves."""

import json
import shutil

import pytest

from ideoflow.cli import main
from ideoflow.diagnostics.codes import recipe as recipe_codes
from ideoflow.resources import recipes


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for name in ("cat", "coffee"):
        shutil.copy(recipes() / "quickstart" / f"{name}.jpg", tmp_path / "pictures")
        (tmp_path / "pictures" / f"{name}.txt").write_text(f"a {name}")
    (tmp_path / "r.toml").write_text(
        '[model]\nbase = "nano"\n[data]\nimages = "pictures"\nresolution = 64\n[cache]\nfolder = "cache"\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(capsys, *argv):
    """(exit code, what --json prints)."""
    capsys.readouterr()
    code = main(["cache", *argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_life_of_a_cache(project, capsys):
    assert main(["cache", "build", "r.toml"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("cached  2 captions, 2 pictures; encoded now: 2 and 2, in ")
    assert "encoding pictures: 2 of 2" in err
    code, built = answer(capsys, "build", "r.toml", "--quiet")
    assert code == 0 and built["encoded"] == {"captions": 0, "pictures": 0}

    code, held = answer(capsys, "stats", "--folder", "cache")
    assert code == 0 and {h["kind"]: h["entries"] for h in held["holdings"]} == {"latents": 2, "text": 2}
    assert main(["cache", "stats", "--folder", "cache"]) == 0
    assert "latents" in capsys.readouterr().out

    code, found = answer(capsys, "verify", "--folder", "cache")
    assert (code, found["entries"], found["damaged"]) == (0, 4, {})

    code, done = answer(capsys, "prune", "r.toml", "--dry-run")
    assert (code, done["entries"]) == (0, 0)
    (project / "pictures" / "cat.txt").write_text("another cat")
    assert main(["cache", "prune", "r.toml"]) == 0
    assert capsys.readouterr().out.startswith("removed 1 entries")
    code, built = answer(capsys, "build", "r.toml", "--quiet")
    assert built["encoded"] == {"captions": 1, "pictures": 0}


def test_damage_is_found_and_mended(project, capsys):
    main(["cache", "build", "r.toml", "--quiet"])
    (shard,) = (project / "cache").glob("latents-*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, found = answer(capsys, "verify", "--folder", "cache")
    assert code == 1 and found["damaged"] == {shard.name: 1}
    assert main(["cache", "verify", "--folder", "cache"]) == 1
    assert shard.name[:20] in capsys.readouterr().out
    assert main(["cache", "verify", "--repair", "--folder", "cache"]) == 0
    code, found = answer(capsys, "verify", "--folder", "cache")
    assert (code, found["entries"]) == (0, 3)


def test_an_empty_cache_is_no_error(project, capsys):
    for action in ("stats", "verify", "prune"):
        assert main(["cache", action, "--folder", "nothing"]) == 0
    assert not (project / "nothing").exists()


def test_a_wrong_recipe_is_told(project, capsys):
    for action in ("build", "prune"):
        assert main(["cache", action, "gone.toml"]) == 1
        assert recipe_codes.NO_FILE.id in capsys.readouterr().err


def test_pages_behind_codes_name_these_commands(capsys):
    for code in ("ID007", "ID008"):
        assert main(["explain", code]) == 0
        assert "ideoflow cache" in capsys.readouterr().out
