"""The data folders are found in a checkout and in an installed wheel."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ideoflow import resources

ROOT = Path(__file__).resolve().parent.parent


def test_a_checkout_uses_its_own_folders():
    assert resources.data_root() == ROOT
    assert resources.recipes() == ROOT / "recipes"


@pytest.mark.parametrize("path", sorted((ROOT / "schemas").glob("*.schema.json")), ids=lambda p: p.name)
def test_schemas_are_json_with_an_id(path):
    schema = json.loads(resources.schema(path.name.removesuffix(".schema.json")))
    assert schema["$id"] and schema["$schema"]


@pytest.mark.parametrize("path", sorted((ROOT / "grammar").glob("*.lark")), ids=lambda p: p.name)
def test_grammars_are_read_as_utf8(path):
    assert resources.grammar(path.name) == path.read_bytes().decode("utf-8")


def test_an_installed_package_uses_its_data_folder(tmp_path):
    package = tmp_path / "site" / "ideoflow"
    (package / "_data" / "grammar").mkdir(parents=True)
    shutil.copy(resources.__file__, package / "resources.py")
    (package / "__init__.py").touch()
    (package / "_data" / "grammar" / "g.lark").write_text("start: é", encoding="utf-8")
    script = "from ideoflow import resources as r; print(r.grammar('g.lark').encode(), r.recipes())"
    run = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(package.parent)!r}); {script}"]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    assert out == f"{'start: é'.encode()!r} {package / '_data' / 'recipes'}"


def test_the_users_cache_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("IDEOFLOW_CACHE", str(tmp_path / "a"))
    assert resources.user_cache() == tmp_path / "a"
    monkeypatch.delenv("IDEOFLOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert resources.user_cache() == tmp_path / "b" / "ideoflow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert resources.user_cache() == tmp_path / "c" / ".cache" / "ideoflow"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path):
    file = tmp_path / "new" / "a.bin"
    for content in (b"first", b"other", b"first"):
        resources.write_whole(file, content)
        assert file.read_bytes() == content

    def power_cut(handle):
        raise OSError("no space left")

    monkeypatch.setattr(resources.os, "fsync", power_cut)
    with pytest.raises(OSError, match="no space left"):
        resources.write_whole(file, b"second")
    assert file.read_bytes() == b"first"
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "new" / "folder"
    with pytest.raises(OSError, match="no space left"), resources.whole_folder(folder) as scratch:
        (scratch / "first").touch()
        raise OSError("no space left")
    assert list(folder.parent.iterdir()) == []
    with resources.whole_folder(folder) as scratch:
        (scratch / "first").touch()
    assert [f.name for f in folder.iterdir()] == ["first"] and list(folder.parent.iterdir()) == [folder]
    with pytest.raises(OSError), resources.whole_folder(folder):  # what is there is never replaced
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_written_file_may_be_read_by_those_who_may_read_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    resources.write_whole(tmp_path / "whole", b"")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode
