"""``ideoflow captions``: what each action prints, writes and returns."""

import json

import pytest

from ideoflow.captions import compile_caption, wrap_text
from ideoflow.cli import main

LAKE = "A lake.\nbackground: Water.\nobj y380..660 x590..720: A boat.\n"
UGLY = "A lake.\r\nbackground:   Water.\r\nobj x590..720 y380..660: A\r\n     boat.\r\n# end"
NEAT = "A lake.\nbackground: Water.\nobj y380..660 x590..720: A boat.\n# end\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "lake.icap").write_text(LAKE, encoding="utf-8")
    return tmp_path


def test_check_of_good_captions(folder, capsys):
    assert main(["captions", "check", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err == "no mistakes found\n"


def test_check_points_at_mistakes_and_counts(folder, capsys):
    (folder / "bad.icap").write_text(
        LAKE.replace("y380..660 x590..720", "[380, 590, 660, 720]"), encoding="utf-8"
    )
    (folder / "warn.icap").write_text(LAKE + "obj y1..1 x1..2: Dot.\n", encoding="utf-8")
    assert main(["captions", "check", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "bad.icap:3:5" in err and "^^^^" in err and "y380..660 x590..720" in err
    assert "warning[IC601]" in err and "warn.icap:4:5" in err
    assert err.endswith("1 error, 1 warning\n")


def test_check_as_json_and_for_github(folder, capsys):
    (folder / "bad.json").write_text(
        '{"compositional_deconstruction":{"background":1,"elements":[]}}', "utf-8"
    )
    assert main(["captions", "check", "--format", "json", str(folder)]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["code"] == "IC503" and found["place"]["column"] == 47
    assert main(["captions", "check", "--format", "github", str(folder)]) == 1
    assert capsys.readouterr().out.startswith("::error title=IC503")


def test_check_knows_placeholders(folder, capsys):
    assert main(["captions", "check", "--set", "token=sks", str(folder)]) == 0
    assert "warning[IC610]: no caption uses <token>" in capsys.readouterr().err
    (folder / "more.icap").write_text(LAKE.replace("A boat", "A <token> <tok>"), encoding="utf-8")
    assert main(["captions", "check", "--set", "token=sks", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "did you mean `<token>`?" in err and "IC610" not in err


def test_check_opens_pictures_when_asked(folder, capsys):
    from PIL import Image

    Image.new("RGB", (60, 40), "#102030").save(folder / "lake.png")
    (folder / "lake.icap").write_text(LAKE + "obj y10px..40px x0px..30px #FF0000: Dot.\n", encoding="utf-8")
    assert main(["captions", "check", str(folder)]) == 0
    assert main(["captions", "check", "--pictures", str(folder)]) == 0
    assert "nothing in its box comes near #FF0000" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["absent", "absent.icap"])
def test_a_path_that_is_not_there(path, tmp_path, capsys):
    for action in ("check", "fmt", "compile", "decompile"):
        assert main(["captions", action, str(tmp_path / path)]) == 1
        assert "does not exist" in capsys.readouterr().err


def test_compile_without_output_prints_json_lines(folder, capsys):
    (folder / "many.icap").write_text(
        "image a\n  background: <x>\nimage b\n  background: b\n", encoding="utf-8"
    )
    assert main(["captions", "compile", "--set", "x=X", str(folder)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [c["compositional_deconstruction"]["background"] for c in lines] == ["Water.", "X", "b"]


def test_decompile_without_output_prints_one_file(folder, capsys):
    (folder / "plain.txt").write_text("A pier.", encoding="utf-8")
    assert main(["captions", "decompile", str(folder / "lake.icap")]) == 0
    assert capsys.readouterr().out == LAKE
    assert main(["captions", "decompile", str(folder)]) == 0
    found = compile_caption(capsys.readouterr().out).captions
    assert [one.name.partition(".")[0] for one in found] == ["lake", "plain"]
    assert found[1].caption == wrap_text("A pier.")


def test_decompile_shares_styles(folder, capsys):
    style = "aesthetics: a\nlighting: l\nphoto: Film still.\nmedium: m\n"
    for name in ("b", "c"):
        (folder / f"{name}.icap").write_text(style + "background: x\n", encoding="utf-8")
    output = folder / "all.icap"
    assert main(["captions", "decompile", "--share-styles", "-o", str(output), str(folder)]) == 0
    text = output.read_text(encoding="utf-8")
    assert text.count("aesthetics: a") == 1 and text.count("style: film-still") == 2
    assert len(compile_caption(text).captions) == 3
    capsys.readouterr()


def test_fmt_writes_checks_and_shows(folder, capsys):
    ugly = folder / "ugly.icap"
    ugly.write_bytes(UGLY.encode())
    assert main(["captions", "fmt", "--check", str(folder)]) == 1
    assert "would change" in capsys.readouterr().err and ugly.read_bytes() == UGLY.encode()
    assert main(["captions", "fmt", "--diff", str(ugly)]) == 1
    assert "+obj y380..660 x590..720: A boat." in capsys.readouterr().out
    assert main(["captions", "fmt", str(folder)]) == 0
    assert ugly.read_bytes() == NEAT.encode() and "formatted" in capsys.readouterr().err
    assert main(["captions", "fmt", "--check", "--diff", str(folder)]) == 0


def test_fmt_leaves_what_it_cannot_read(folder, capsys):
    (folder / "bad.icap").write_text("foo: bar\n", encoding="utf-8")
    (folder / "latin.icap").write_bytes("A café.\n".encode("latin-1"))
    assert main(["captions", "fmt", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "IC105" in err and "IC115" in err
    assert (folder / "bad.icap").read_text(encoding="utf-8") == "foo: bar\n"


def test_fmt_of_standard_input(monkeypatch, capsys):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(UGLY))
    assert main(["captions", "fmt", "-"]) == 0
    assert capsys.readouterr().out == NEAT


def test_check_explains_codes_and_wants_a_path(capsys):
    assert main(["captions", "check", "--explain", "ic201"]) == 0
    assert capsys.readouterr().out.startswith("IC201: a box pasted from JSON")
    with pytest.raises(SystemExit) as stopped:
        main(["captions", "check"])
    assert stopped.value.code == 2


def test_a_colour_without_its_sign_is_told_so(tmp_path, capsys):
    (tmp_path / "a.icap").write_text("A sail.\nbackground: Sea.\nobj y1..9 x1..9 f4ebd0: A sail.\n")
    assert main(["captions", "check", str(tmp_path)]) == 1
    assert "write `#F4EBD0`" in capsys.readouterr().err
