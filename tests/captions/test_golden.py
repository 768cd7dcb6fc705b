"""Golden files, four a case: NAME.icap, and what becomes of it: .json, .fmt, .err.

``.json`` holds a line for each caption (with its image's name in a file for many), ``.fmt`` the formatted
file, ``.err`` the diagnostics as a person sees them. ``IDEOFLOW_UPDATE_GOLDEN=1`` writes them anew: read the
diff.
"""

import json
import os
import re
from pathlib import Path

import pytest
from verifier import verify

from ideoflow.captions import compile_caption, format_icap
from ideoflow.diagnostics import IdeoflowError, render_text

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.icap"))
MISTAKES = [name for name in CASES if name.startswith("err_")]


def outcome(name):
    text = (GOLDEN / f"{name}.icap").read_bytes().decode("utf-8")
    result = compile_caption(text, path=f"{name}.icap", base_dir=GOLDEN)
    lines = []
    for one in result.captions:
        assert verify(one.json) == []
        prefix = "" if one.name is None else f"{json.dumps(one.name, ensure_ascii=False)}: "
        lines.append(prefix + one.json + "\n")
    try:
        formatted = format_icap(text, f"{name}.icap")
    except IdeoflowError:
        formatted = ""
    errors = render_text(result.diagnostics)
    return {"json": "".join(lines), "fmt": formatted, "err": errors + "\n" if errors else ""}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    for suffix, found in outcome(name).items():
        path = GOLDEN / f"{name}.{suffix}"
        if os.environ.get("IDEOFLOW_UPDATE_GOLDEN"):
            path.write_bytes(found.encode("utf-8"))
        assert path.read_bytes().decode("utf-8") == found, f"{name}.{suffix}"


@pytest.mark.parametrize("name", CASES)
def test_formatted_files_are_formatted_and_say_the_same(name):
    formatted = (GOLDEN / f"{name}.fmt").read_text(encoding="utf-8")
    if formatted:
        assert format_icap(formatted) == formatted
        again = compile_caption(formatted, base_dir=GOLDEN)
        first = compile_caption((GOLDEN / f"{name}.icap").read_bytes().decode("utf-8"), base_dir=GOLDEN)
        assert [one.json for one in again.captions] == [one.json for one in first.captions]


def test_every_mistake_has_a_cure_and_a_code_of_its_own():
    codes = set()
    for name in MISTAKES:
        text = (GOLDEN / f"{name}.err").read_text(encoding="utf-8")
        found = re.findall(r"^(?:error|warning)\[(IC\d+)\]", text, re.MULTILINE)
        assert found, name
        assert text.count("= help: ") == len(found), name
        codes |= set(found)
    assert len(codes) >= 30
