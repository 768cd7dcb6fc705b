"""The profile's section of the report: its figures are the file's, and a broken file is no section."""

import io
import json
from html import unescape

import pytest
from rich.console import Console

from ideoflow.report.profile import profile, terminal_table

FOUND = {
    "trace": "trace.json.gz", "numbers": [11, 12, 13], "device": "NVIDIA H200", "steps": 3, "wall_ms": 293.4,
    "counted": "kernels", "overlap_ms": 1.5,
    "parts": [
        {"part": "attention, backward", "ms": 94.1, "share": 0.3207, "calls": 102.0,
         "longest": [{"name": "void <script>kernel</script>", "ms": 90.0}]},
        {"part": "idle", "ms": 2.25, "share": 0.0077, "calls": 0.0, "longest": []},
    ],
}  # fmt: skip


def put(folder, text):
    (folder / "profile").mkdir()
    (folder / "profile" / "profile.json").write_text(text)
    return folder


def test_the_section_tells_the_figures(tmp_path):
    page = str(profile(put(tmp_path, json.dumps(FOUND))))
    assert "<script>" not in page
    text = unescape(page)
    for part in ("Steps 11 to 13 on NVIDIA H200: 293 ms a step", "94.1", "32.1 %", "102", "trace.json.gz",
                 "90 ms  void <script>", "1.5 ms in which two kernels ran at once"):  # fmt: skip
        assert part.lower() in text.lower(), part


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"parts": 3}', json.dumps({**FOUND, "parts": [{}]})])
def test_a_broken_profile_is_left_out(tmp_path, text):
    assert profile(put(tmp_path, text)) is None


def test_a_run_without_a_profile_has_no_section(tmp_path):
    assert profile(tmp_path) is None


def test_the_terminal_shows_every_part_in_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(FOUND))
    text = console.export_text()
    assert "attention, backward" in text and "94.10" in text and "32.1%" in text and "…" not in text
