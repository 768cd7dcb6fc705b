"""Recipes: what is read, what is refused, and where the caret stands."""

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toml_documents import documents

from ideoflow.diagnostics import IdeoflowError, render_text
from ideoflow.diagnostics.codes import recipe as codes
from ideoflow.recipe import RecipeTables, load_recipe, parse_recipe
from ideoflow.recipe.elsewhere import COMPILE_ELSEWHERE
from ideoflow.recipe.sources import matching_files

HEAD = '[model]\nbase = "nano"\n[data]\nimages = "pictures"\n'


def refused(text):
    """The diagnostics for a recipe that is wrong."""
    with pytest.raises(IdeoflowError) as caught:
        parse_recipe(text)
    return caught.value.diagnostics


def marked(diagnostic):
    """The characters over the caret."""
    span = diagnostic.span
    return span.source[span.column - 1 : span.end_column - 1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "prompts").mkdir()
    for name in ("b.icap", "a.icap", "c[1].txt"):
        (tmp_path / "prompts" / name).write_text("x")
    return tmp_path


# What is read ---------------------------------------------------------------------------------------------


def test_a_short_recipe_has_every_default():
    recipe = parse_recipe(HEAD, "portrait.toml")
    assert recipe.tables.model.base == "nano"
    assert recipe.name == "portrait"
    assert recipe.tables.train.steps == 1000 and not recipe.is_set("train.steps")
    assert str(recipe.output_folder) == "outputs/portrait"


def test_every_kind_of_value_is_read():
    text = HEAD + (
        "[captions]\nplaceholders = { token = 'sks sailboat', other = '' }\nwrap = false\n"
        "[adapter]\ntargets = ['layers.*.attention.*']\nalpha = 8\n"
        "[train]\nlearning_rate = 1\nbetas = [0, 0.5]\nschedule = { mu = -1 }\n"
        "[validate]\nprompts = ['a']\nwidth = 512\n"
    )
    tables = parse_recipe(text).tables
    assert tables.captions.placeholders == {"token": "sks sailboat", "other": ""}
    assert tables.captions.wrap is False
    assert tables.adapter.targets == ("layers.*.attention.*",)
    assert tables.adapter.alpha == 8.0 and isinstance(tables.adapter.alpha, float)
    assert tables.train.learning_rate == 1.0 and isinstance(tables.train.learning_rate, float)
    assert tables.train.betas == (0.0, 0.5)
    assert (tables.train.schedule.mu, tables.train.schedule.std) == (-1.0, 1.5)
    assert (tables.validate.prompts, tables.validate.width) == (("a",), 512)


def test_the_way_it_is_written_does_not_matter():
    dotted = "model.base = 'nano'\ndata = {images = 'pictures', resolution = 256}"
    tables = HEAD.replace('"nano"', "'''nano'''") + "# comment\nresolution = 0x100\n"
    assert parse_recipe(dotted).tables == parse_recipe(tables).tables
    assert parse_recipe(dotted).digest == parse_recipe(tables).digest


def test_the_digest_changes_with_every_setting():
    changed = ["resolution = 512", "[train]\nseed = 1", "[output]\ndtype = 'float32'", "[train]\nsteps = 999"]
    digests = {parse_recipe(HEAD + extra).digest for extra in ["", *changed]}
    assert len(digests) == len(changed) + 1
    assert parse_recipe(HEAD + "[train]\nsteps = 1000").digest in digests, "a default that is written out"


def test_a_file_with_windows_line_ends_and_a_byte_order_mark(folder):
    file = folder / "r.toml"
    file.write_bytes(b"\xef\xbb\xbf" + (HEAD + "[train]\nsteps = 5\n").replace("\n", "\r\n").encode())
    recipe = load_recipe(file)
    assert recipe.tables.train.steps == 5
    assert (recipe.span("train.steps").line, recipe.span("train.steps").column) == (6, 9)


def test_a_span_falls_back_to_the_table_and_the_file():
    recipe = parse_recipe(HEAD)
    assert recipe.span("data.images").line == 4
    assert recipe.span("data.caption").line == 3
    assert recipe.span("train.steps").line == 0


def test_prompts_are_globs_or_names(folder):
    assert [p.name for p in matching_files(folder, "prompts/*.icap")] == ["a.icap", "b.icap"]
    assert [p.name for p in matching_files(folder, str(folder / "prompts" / "a.*"))] == ["a.icap"]
    assert [p.name for p in matching_files(folder, "prompts/c[1].txt")] == ["c[1].txt"]
    assert [p.name for p in matching_files(folder, "prompts/[ab].icap")] == ["a.icap", "b.icap"]
    for none in ("", "prompts", "**a", "/", "//", "prompts/*.jpg", "../x"):
        assert matching_files(folder, none) == []


# What is refused ------------------------------------------------------------------------------------------

# Every code: the text after the head, the code, the characters over the caret, words of message and cure.
CASES = {
    "no value": ("steps =", codes.BAD_TOML, "", "not valid TOML: invalid value", "texts need quotes"),
    "key twice": ("images = 'a'", codes.BAD_TOML, "", "not valid TOML", "each key may come once"),
    "misspelt key": (
        "[train]\nlearnign_rate = 1e-4",
        codes.UNKNOWN_KEY,
        "learnign_rate",
        "unknown key 'learnign_rate' in [train]",
        "did you mean 'learning_rate'?",
    ),
    "misspelt table": ("[trian]", codes.UNKNOWN_KEY, "trian", "unknown key 'trian'", "did you mean 'train'?"),
    "a trap known from elsewhere": (
        "[memory]\ncompile = 'reduce-overhead'",
        codes.OTHER_TRAINER,
        "'reduce-overhead'",
        "'compile' cannot be 'reduce-overhead': it replays CUDA graphs",
        "write 'regional', or 'auto' for what pays on this card",
    ),
    "off as others say it": (
        "[memory]\ncompile = false",
        codes.OTHER_TRAINER,
        "false",
        "'compile' cannot be false: it is how other trainers say it",
        "write 'off'",
    ),
    "key of another table": (
        "steps = 5",
        codes.UNKNOWN_KEY,
        "steps",
        "unknown key 'steps' in [data]",
        "'steps' belongs in [train] or [validate]",
    ),
    "unlike any": (
        "[train]\n'a.b' = 1",
        codes.UNKNOWN_KEY,
        "'a.b'",
        "unknown key 'a.b' in [train]",
        "known here: steps, learning_rate,",
    ),
    "dotted": (
        "[train]\nschedule.mean = 0",
        codes.UNKNOWN_KEY,
        "mean",
        "unknown key 'mean' in [train.schedule]",
        "known here: mu, std",
    ),
    "text for a number": (
        "[adapter]\nrank = '32'",
        codes.WRONG_TYPE,
        "'32'",
        "a whole number, not a text",
        "",
    ),
    "float for a whole number": ("[adapter]\nrank = 32.0", codes.WRONG_TYPE, "32.0", "not a number", ""),
    "true for a number": ("[train]\nsteps = true", codes.WRONG_TYPE, "true", "not true or false", ""),
    "date": ("[train]\nsteps = 1979-05-27 07:32:00", codes.WRONG_TYPE, "1979-05-27 07:32:00", "a date", ""),
    "list": (
        "[validate]\nprompts = ['a', 3]",
        codes.WRONG_TYPE,
        "['a', 3]",
        "must be a list of texts, not a list holding a whole number",
        "",
    ),
    "table of texts": (
        "[captions.placeholders]\ntoken = 1",
        codes.WRONG_TYPE,
        "placeholders",
        "must be a table of texts, not a table holding a whole number",
        "",
    ),
    "no table": (
        "[train]\nschedule = 3",
        codes.WRONG_TYPE,
        "3",
        "is a table",
        "write it as [train.schedule]",
    ),
    "array of tables": ("[[output]]", codes.WRONG_TYPE, "output", "is a table, not a list", "[output]"),
    "too small": ("[adapter]\nrank = 0", codes.BAD_VALUE, "0", "rank' is 0, but must be at least 1", ""),
    "too large": ("resolution = 4096", codes.BAD_VALUE, "4096", "must be at most 2048", ""),
    "off the grid": (
        "resolution = 500",
        codes.BAD_VALUE,
        "500",
        "must be a multiple of 16; the nearest are 496 and 512",
        "Side in pixels",
    ),
    "not above": ("[train]\nlearning_rate = 0", codes.BAD_VALUE, "0", "must be above 0", ""),
    "nan": ("[train]\nlearning_rate = nan", codes.BAD_VALUE, "nan", "must be finite", ""),
    "infinite": ("[train.schedule]\nmu = -inf", codes.BAD_VALUE, "-inf", "must be finite", ""),
    "128 bits": (f"[train]\nseed = {2**64}", codes.BAD_VALUE, str(2**64), "longer than 64 bits", ""),
    "400 digits": (f"[train]\nweight_decay = {'9' * 400}", codes.BAD_VALUE, "9" * 400, "must be finite", ""),
    "no choice": (
        "aspect = 'squared'",
        codes.BAD_VALUE,
        "'squared'",
        "'aspect' cannot be 'squared'",
        "did you mean 'square'?",
    ),
    "far from any choice": (
        "aspect = 'x'",
        codes.BAD_VALUE,
        "'x'",
        "cannot be 'x'",
        "one of: preserve, square",
    ),
    "neither auto nor a number": (
        "[memory]\nexact_blocks = 'six'",
        codes.BAD_VALUE,
        "'six'",
        "cannot be 'six'",
        "auto or a whole number",
    ),
    "no set of targets": ("[adapter]\ntargets = 'mpl'", codes.BAD_VALUE, "'mpl'", "cannot be 'mpl'", "'mlp'"),
    "nul": (
        'caption = "instance"\ninstance_prompt = "a\\u0000"',
        codes.BAD_VALUE,
        '"a\\u0000"',
        "NUL",
        "remove",
    ),
    "one beta": ("[train]\nbetas = [0.9]", codes.BAD_VALUE, "[0.9]", "betas must be two numbers", ""),
    "beta of one": ("[train]\nbetas = [0.9, 1]", codes.BAD_VALUE, "[0.9, 1]", "below 1", ""),
    "name with a folder": (
        "[output]\nname = 'a/b'",
        codes.BAD_VALUE,
        "'a/b'",
        "name of a file",
        "output.folder",
    ),
    "name of a folder": ("[output]\nname = '..'", codes.BAD_VALUE, "'..'", "name of a file", ""),
    "name too long": (f"[output]\nname = '{'a' * 201}'", codes.BAD_VALUE, "", "too long", "200 bytes"),
    "folder too long": (f"[output]\nfolder = 'x/{'a' * 256}'", codes.BAD_VALUE, "", "too long", "255 bytes"),
    "instance without words": (
        "caption = 'instance'",
        codes.IMPOSSIBLE_PAIR,
        "'instance'",
        "needs an instance_prompt",
        "add instance_prompt",
    ),
    "words without instance": (
        "instance_prompt = 'a cat'",
        codes.IMPOSSIBLE_PAIR,
        "'a cat'",
        "instance_prompt is set, but caption = 'auto'",
        "set caption = 'instance'",
    ),
    "names that are not wrapped": (
        "caption = 'filename'\n[captions]\nwrap = false",
        codes.IMPOSSIBLE_PAIR,
        "false",
        "names of files are plain text",
        "set wrap = true",
    ),
    "endless warm-up": (
        "[train]\nsteps = 5\nwarmup = 5",
        codes.IMPOSSIBLE_PAIR,
        "5",
        "a warm-up of 5 never ends within 5 steps",
        "smaller than train.steps",
    ),
    "variants of nothing": (
        "[captions]\nvariants = 4",
        codes.IMPOSSIBLE_PAIR,
        "4",
        "captions.variants is set, but nothing varies them",
        "shuffle = true",
    ),
    "sampling nothing": (
        "[validate]\nevery = 5",
        codes.IMPOSSIBLE_PAIR,
        "5",
        "validate.every is set, but there are no validate.prompts",
        "add prompts",
    ),
    "compiling on a CPU": (
        "[memory]\ndevice = 'cpu'\ncompile = 'regional'",
        codes.IMPOSSIBLE_PAIR,
        "'regional'",
        "is for GPUs",
        "'auto' or 'off'",
    ),
    "glob without a match": (
        "[adapter]\ntargets = ['layers.*.attention.*', 'layer.*']",
        codes.NO_TARGETS,
        "['layers.*.attention.*', 'layer.*']",
        "'layer.*' matches no Linear",
        "targets = 'all'",
    ),
    "no targets": ("[adapter]\ntargets = []", codes.NO_TARGETS, "[]", "targets is an empty list", ""),
}


@pytest.mark.parametrize("value", COMPILE_ELSEWHERE)
def test_every_way_to_ask_for_compiling_elsewhere_is_told_what_to_write_here(value):
    (found,) = refused(f"{HEAD}[memory]\ncompile = '{value.upper()}'")
    assert found.code is codes.OTHER_TRAINER
    written = found.cure.split("'")[1]
    assert parse_recipe(f"{HEAD}[memory]\ncompile = '{written}'").tables.memory.compile == written


@pytest.mark.parametrize("name", CASES)
def test_is_refused_at_its_place(name):
    extra, code, under, message, cure = CASES[name]
    (diagnostic,) = refused(HEAD + extra)
    assert diagnostic.code is code
    assert message in diagnostic.message and cure in diagnostic.cure
    if under:
        assert marked(diagnostic) == under
    assert diagnostic.span.line > 4, "at its own line, not at a line of the head"


@pytest.mark.parametrize("key", ["base", "parts", "revision"])
def test_what_no_base_can_be_called_is_refused(key):
    value = "" if key == "revision" else "a" * 5000
    text = HEAD.replace("[data]", f"{key} = '{value}'\n[data]", 1)
    if key == "base":
        text = HEAD.replace("nano", value)
    (diagnostic,) = refused(text)
    assert diagnostic.code is codes.BAD_VALUE and f"model.{key} is" in diagnostic.message and diagnostic.cure


def test_a_missing_key_is_named_with_what_it_is_for():
    diagnostics = refused("[model]\n[data]\nresolution = 64")
    assert [(d.code, d.span.line, marked(d)) for d in diagnostics] == [
        (codes.MISSING_KEY, 1, "model"),
        (codes.MISSING_KEY, 2, "data"),
    ]
    assert diagnostics[0].message == "the key 'base' is missing" and "nano" in diagnostics[0].cure


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing", "[train]\nsteps = 3"])
def test_missing_tables_are_named(text):
    diagnostics = refused(text)
    assert [d.message for d in diagnostics] == ["the table [model] is missing", "the table [data] is missing"]
    assert {d.code for d in diagnostics} == {codes.MISSING_KEY} and diagnostics[0].span.path == "recipe.toml"


def test_several_mistakes_are_told_at_once_in_the_order_of_the_file():
    text = "[train]\nsteps = -1\nsead = 3\n[model]\nbase = 7\n[data]\nimages = 'x'\nresolution = 100\n"
    assert render_text(refused(text)) == (
        "error[IR005]: 'steps' is -1, but must be at least 1\n"
        " --> recipe.toml:2:9\n"
        "  |\n"
        "2 | steps = -1\n"
        "  |         ^^ must be at least 1\n"
        "  = help: Optimiser steps to train for.\n\n"
        "error[IR003]: unknown key 'sead' in [train]\n"
        " --> recipe.toml:3:1\n"
        "  |\n"
        "3 | sead = 3\n"
        "  | ^^^^ not a key of a recipe\n"
        "  = help: did you mean 'seed'?\n\n"
        "error[IR004]: 'base' must be a text, not a whole number\n"
        " --> recipe.toml:5:8\n"
        "  |\n"
        "5 | base = 7\n"
        "  |        ^ expected a text\n\n"
        "error[IR005]: 'resolution' is 100, but must be a multiple of 16; the nearest are 96 and 112\n"
        " --> recipe.toml:8:14\n"
        "  |\n"
        "8 | resolution = 100\n"
        "  |              ^^^ must be a multiple of 16; the nearest are 96 and 112\n"
        "  = help: Side in pixels of a square of the area that pictures are resized to; see resolution_type."
    )


def test_no_more_than_twenty_are_told():
    assert len(refused(HEAD + "".join(f"key{i} = 1\n" for i in range(100)))) == 20


def test_contradictions_are_told_together():
    text = HEAD + "caption = 'instance'\n[train]\nsteps = 1\nwarmup = 2\n[validate]\nseed = 1\nevery = 1\n"
    assert [d.span.line for d in refused(text)] == [5, 8, 10, 11]


@pytest.mark.parametrize("depth", [100, 450, 600, 800, 1000, 10_000])
def test_deep_nesting_is_no_traceback(depth):
    for opening, closing in ("[]", ("{a=", "}")):
        (diagnostic,) = refused(HEAD + "x = " + opening * depth + "1" * (opening != "[") + closing * depth)
        assert diagnostic.code in (codes.UNKNOWN_KEY, codes.BAD_TOML)


def test_too_many_digits_are_no_traceback():
    (diagnostic,) = refused(HEAD + "[train]\nsteps = " + "9" * 5000)
    assert diagnostic.code is codes.BAD_TOML and "digits" in diagnostic.message


# Files ----------------------------------------------------------------------------------------------------


def failed_to_load(file):
    with pytest.raises(IdeoflowError) as caught:
        load_recipe(file)
    return caught.value.diagnostics


def test_a_file_that_is_not_there_names_its_neighbours(folder):
    (folder / "other.toml").write_text(HEAD)
    (diagnostic,) = failed_to_load(folder / "missing.toml")
    assert diagnostic.code is codes.NO_FILE and "other.toml" in diagnostic.cure
    (diagnostic,) = failed_to_load(folder / "nowhere" / "missing.toml")
    assert diagnostic.cure == "give the path of a .toml recipe"


def test_what_is_no_text_file(folder):
    (folder / "latin.toml").write_bytes(HEAD.encode() + "# caf\u00e9".encode("latin-1"))
    for file, words in (
        ("latin.toml", "not UTF-8"),
        ("pictures", "directory"),
        ("latin.toml/x", "directory"),
    ):
        (diagnostic,) = failed_to_load(folder / file)
        assert diagnostic.code is codes.NO_FILE and words in diagnostic.message


def test_paths_that_are_not_there_are_told_together(folder):
    head = "[model]\nbase = 'nano'\n[data]\nimages = 'no where'\n"
    (folder / "r.toml").write_text(head + "[validate]\nprompts = [\n 'prompts/*',\n 'x*',\n '']\n")
    diagnostics = failed_to_load(folder / "r.toml")
    assert [(d.code, d.span.line, marked(d)) for d in diagnostics] == [
        (codes.NO_SUCH_PATH, 4, "'no where'"),
        (codes.NO_SUCH_PATH, 8, "'x*'"),
        (codes.NO_SUCH_PATH, 9, "''"),
    ]
    assert str(folder / "no where") in diagnostics[0].message
    long = f"[model]\nbase = 'nano'\n[data]\nimages = '{'a' * 5000}'\nimage_folder = '{'b' * 300}'\n"
    (folder / "long.toml").write_text(long + f"[validate]\nprompts = ['{'c' * 300}']\n")
    assert {d.code for d in failed_to_load(folder / "long.toml")} == {codes.NO_SUCH_PATH}
    (folder / "no where").touch()
    assert "is a file, not a folder" in failed_to_load(folder / "r.toml")[0].message


# Anything at all ------------------------------------------------------------------------------------------


def read_or_refuse(text):
    try:
        assert isinstance(parse_recipe(text).tables, RecipeTables)
    except IdeoflowError as error:
        assert error.diagnostics and render_text(error.diagnostics)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=60) | st.text("[]{}=.,\"'#\\\n\r 0a-", max_size=30))
def test_any_text_is_read_or_refused(text):
    read_or_refuse(text)
    read_or_refuse(HEAD + text)


@settings(max_examples=50, deadline=None)
@given(documents())
def test_any_toml_is_refused_with_diagnostics(text):
    read_or_refuse(text)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def toml(value):
    """TOML for plain data; ``None`` is written as a date."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08X}" for c in value if not 0xD800 <= ord(c) < 0xE000) + '"'
    return "1999-01-01" if value is None else str(value)


KEYS = [f"{table.name}.{key.name}" for table in fields(RecipeTables) for key in fields(
    type(getattr(parse_recipe(HEAD).tables, table.name)))]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), ODD, max_size=6))
def test_any_value_of_any_key_is_read_or_refused(values):
    text = "".join(f"{key} = {toml(value)}\n" for key, value in values.items())
    read_or_refuse(text)
