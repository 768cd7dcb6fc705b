"""The door: commands, exit codes, and where output goes."""

import json
import subprocess
import sys

import pytest

from ideoflow import __version__
from ideoflow.cli import COMMANDS, main
from ideoflow.diagnostics.codes import all_codes


def exit_code(*argv: str) -> int:
    """What the process would exit with; argparse leaves by SystemExit."""
    try:
        return main(list(argv))
    except SystemExit as stop:
        return stop.code


def test_version(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"ideoflow {__version__}\n"


def test_help_lists_every_command(capsys):
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert exit_code(name, "--help") == 0
    assert f"usage: ideoflow {name}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [(), ("paint",), ("explain", "IC001", "IC002")])
def test_a_misuse_is_told_on_stderr_without_a_traceback(argv, capsys):
    assert exit_code(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: ideoflow") and "error:" in err


def test_explain_prints_the_page(capsys):
    code = next(iter(all_codes().values()))
    for argv in (("explain", code.id.lower()), ("--explain", code.id)):
        assert exit_code(*argv) == 0
        assert capsys.readouterr().out == f"{code.id}: {code.title} ({code.severity})\n\n{code.explanation}\n"


def test_explain_lists_all(capsys):
    assert exit_code("explain") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(all_codes())


def test_explain_of_an_unknown_code_suggests(capsys):
    known = next(iter(all_codes()))
    assert exit_code("explain", known[:-1] + "x") == 1
    out, err = capsys.readouterr()
    assert out == "" and "did you mean" in err


def test_a_reader_that_goes_away_is_not_an_error():
    # `ideoflow explain | true`: the pipe's reader has gone before the list is written.
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "ideoflow", "explain"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_missing_recipe_is_a_diagnostic(tmp_path, capsys):
    assert exit_code("plan", str(tmp_path / "absent.toml")) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error[IR001]") and "Traceback" not in err


def test_diagnostics_as_json_go_to_stdout(tmp_path, capsys):
    (tmp_path / "bad.icap").write_text("A lake.\nobj [380, 590, 660, 720]: boat\n", encoding="utf-8")
    assert exit_code("captions", "check", "--format", "json", str(tmp_path)) == 1
    found = json.loads(capsys.readouterr().out)
    assert found[0]["severity"] == "error" and found[0]["place"]["line"] == 2
