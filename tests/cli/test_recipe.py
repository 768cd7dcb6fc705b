"""``ideoflow recipe import``: what goes where, and nothing is overwritten."""

import json

from ideoflow.cli import main

CONFIG = {"model_family": "ideogram", "lora_rank": 8, "optimizer": "prodigy", "ideogram_validation": True,
          "validation_prompt": "a boat"}  # fmt: skip


def test_import(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "loader.json").write_text(json.dumps([{"id": "a", "instance_data_dir": "a"}]))
    command = ["recipe", "import", "config.json", "loader.json"]
    assert main([*command, "-o", "-"]) == 0
    shown, _ = capsys.readouterr()
    assert "rank = 8" in shown and not (tmp_path / "config.toml").exists()

    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "Wrote config.toml" in out and "IR020" in err and "prodigy" in err
    assert (tmp_path / "config.toml").read_text() == shown
    assert (tmp_path / "config-prompts" / "validation.txt").read_text() == "a boat"

    (tmp_path / "config.toml").write_text("mine")
    assert main(command) == 1
    assert "IR022" in capsys.readouterr().err and (tmp_path / "config.toml").read_text() == "mine"
    assert main([*command, "--force"]) == 0
    assert (tmp_path / "config.toml").read_text() == shown


def test_where_nothing_can_be_written(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "file").touch()
    assert (
        main(["recipe", "import", str(tmp_path / "config.json"), "-o", str(tmp_path / "file" / "r.toml")])
        == 1
    )
    assert "IR023" in capsys.readouterr().err
    assert main(["recipe", "import", str(tmp_path / "gone.json")]) == 1
    assert "IR021" in capsys.readouterr().err
