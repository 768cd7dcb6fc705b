"""The table of codes is complete, documented and never double."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from ideoflow.diagnostics import codes
from ideoflow.diagnostics.codes import DOMAINS, Code, all_codes, find_code

FOLDER = Path(codes.__file__).parent
CODES = list(all_codes().values())


@pytest.mark.parametrize("code", CODES, ids=str)
def test_every_code_has_a_page(code):
    assert re.fullmatch(r"I[A-Z]\d{3}", code.id)
    assert code.title and not code.title.endswith(".")
    assert len(code.title) <= 60
    assert len(code.explanation.split()) >= 12, "say what it is, why it matters and what to do instead"
    assert code.severity in ("error", "warning", "note")


def test_prefixes_are_those_of_their_domain():
    for prefix, modules in DOMAINS.items():
        for name in modules:
            module = import_module(f"ideoflow.diagnostics.codes.{name}")
            for code in (c for c in vars(module).values() if isinstance(c, Code)):
                assert code.id.startswith(prefix), f"{code.id} stands in codes/{name}.py"


def test_every_module_of_codes_is_in_the_table():
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert modules == {name for names in DOMAINS.values() for name in names}


def test_ids_are_unique_in_the_sources():
    ids = [
        node.args[0].value
        for path in FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "define"
    ]
    assert sorted(ids) == sorted(set(ids)) == sorted(all_codes())


def test_defining_an_id_twice_fails():
    taken = CODES[0].id
    with pytest.raises(ValueError, match=f"{taken} is defined twice"):
        codes.define(taken, "again", "again")
    assert all_codes()[taken] is CODES[0]


def test_codes_are_found_in_any_letter_case():
    assert find_code(CODES[0].id.lower()) is CODES[0]
    assert find_code("IX000") is None
