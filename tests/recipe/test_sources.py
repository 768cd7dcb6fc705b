"""[data] and [[data.source]]: defaults that are taken over, contradictions, names of several files."""

import pytest

from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import recipe as codes
from ideoflow.recipe import parse_recipe
from ideoflow.recipe.sources import matching_files

HEAD = '[model]\nbase = "nano"\n[data]\nimages = "pictures"\n'


def refused(text):
    with pytest.raises(IdeoflowError) as caught:
        parse_recipe(text)
    return caught.value.diagnostics


@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ("crop = 'face'", "write 'center'"),
        ("crop = false", "write 'off'"),
        ("caption = 'textfile'", "write 'sidecar'"),
        ("caption = 'parquet'", "write 'column'"),
    ],
)
def test_values_of_other_data_loaders(line, cure):
    (diagnostic,) = refused(HEAD + line)
    assert diagnostic.code is codes.OTHER_TRAINER and cure in diagnostic.cure


SOURCES = "[model]\nbase = 'nano'\n[data]\nresolution = 512\n[[data.source]]\nimages = 'a'\n"


def test_sources_take_over_what_they_do_not_say():
    recipe = parse_recipe(SOURCES + "flip = true\n[[data.source]]\nimages = 'b'\nresolution = 256")
    a, b = recipe.tables.data.sources
    assert (a.resolution, a.flip, b.resolution, b.flip) == (512, True, 256, False)
    assert recipe.source_span(0, "resolution").line == 4 and recipe.source_span(1, "resolution").line == 10
    assert recipe.source_span(1, "crop").line == 8, "the table, where the key is nowhere"
    no_default = parse_recipe(SOURCES.replace("resolution = 512\n", "") + "resolution = 768")
    assert no_default.tables.data.resolution == 768, "validation pictures go by the sources"


AREA = "resolution_type = 'area'\n"


@pytest.mark.parametrize(
    ("lines", "sizes"),
    [
        ("", (1024, 0, None, None)),
        ("resolution = 1.0", (1024, 0, None, None)),
        ("resolution = 1", (1024, 0, None, None)),
        ("resolution = 0.25\nminimum_image_size = 0.0625", (512, 250, None, None)),
        ("maximum_image_size = 4.0\ntarget_downsample_size = 2.0", (1024, 0, 2048, 1536)),
        ("resolution = 0.7", (832, 0, None, None)),  # sqrt(700,000) = 836.7
    ],
)
def test_megapixels_become_pixels(lines, sizes):
    (source,) = parse_recipe(HEAD + AREA + lines).tables.data.sources
    found = (source.resolution, source.minimum_image_size, source.maximum_image_size,
             source.target_downsample_size)  # fmt: skip
    assert found == sizes and source.resolution_type == "pixel_area"
    pixels = [f"{k} = {v}" for k, v in zip(KEYS, sizes, strict=True) if v is not None]
    assert parse_recipe(HEAD + "\n".join(pixels)).digest == parse_recipe(HEAD + AREA + lines).digest


KEYS = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")


def test_each_source_counts_as_it_says():
    head = HEAD + AREA + "resolution = 0.25\n"
    text = head + "[[data.source]]\nimages = 'a'\n[[data.source]]\nimages = 'b'\nresolution = 1.0\n"
    text += "[[data.source]]\nimages = 'c'\nresolution_type = 'pixel'\nresolution = 768\n"
    text += "[[data.source]]\nimages = 'd'\nresolution_type = 'pixel'\n"
    sources = parse_recipe(text).tables.data.sources
    assert [s.resolution for s in sources] == [512, 1024, 768, 512]
    assert [s.resolution_type for s in sources] == ["pixel_area", "pixel_area", "pixel", "pixel"]
    text = HEAD + "resolution = 512\n[[data.source]]\nimages = 'a'\n" + AREA
    assert parse_recipe(text).tables.data.sources[0].resolution == 512, "pixels, as [data] says"


@pytest.mark.parametrize("wrong", ["1024", "0", "-1.0", "5.0", "nan"])
def test_sizes_that_are_no_megapixels(wrong):
    (diagnostic,) = refused(HEAD + AREA + f"resolution = {wrong}")
    assert diagnostic.code is codes.BAD_VALUE and "megapixels" in diagnostic.message
    assert diagnostic.span.line == 6 and "pixel_area" in diagnostic.cure
    (diagnostic,) = refused(HEAD + f"[[data.source]]\n{AREA}minimum_image_size = 256")
    assert diagnostic.span.line == 7


@pytest.mark.parametrize(
    ("text", "code", "line", "says"),
    [
        (SOURCES + "resolution = 100", codes.BAD_VALUE, 7, "multiple of 16"),
        (SOURCES.replace("512", "100"), codes.BAD_VALUE, 4, "multiple of 16"),
        (SOURCES.replace("images = 'a'\n", "repeats = 2\n"), codes.MISSING_KEY, 5, "no images"),
        (SOURCES + "[[data.source]]\nimages = 'a'", codes.BAD_VALUE, 7, "two sources"),
        (SOURCES + "weight = 1.0\n[[data.source]]\nimages = 'b'", codes.IMPOSSIBLE_PAIR, 8, "has no weight"),
        (SOURCES + "weight = 1.0\nrepeats = 2", codes.IMPOSSIBLE_PAIR, 8, "so do repeats"),
        (SOURCES + "captoin = 'auto'", codes.UNKNOWN_KEY, 7, "captoin"),
        (HEAD + "weight = 2.0", codes.UNKNOWN_KEY, 5, "weight"),
        (HEAD + "source = 3", codes.WRONG_TYPE, 5, "list of tables"),
        (HEAD + "crop_variants = 4", codes.IMPOSSIBLE_PAIR, 5, "all be the same"),
        (HEAD + "crop = 'off'\naspect = 'square'", codes.IMPOSSIBLE_PAIR, 5, "distort"),
        (HEAD + "maximum_image_size = 2000", codes.IMPOSSIBLE_PAIR, 5, "needs target_downsample_size"),
        (HEAD + "crop = 'off'\ntarget_downsample_size = 900", codes.IMPOSSIBLE_PAIR, 6, "keeps all"),
        (HEAD + "aspects = [0]", codes.BAD_VALUE, 5, "1/16"),
        (HEAD + "caption = 'filename'\ncaption_column = 'x'", codes.IMPOSSIBLE_PAIR, 6, "elsewhere"),
    ],
)
def test_sources_that_are_wrong(text, code, line, says):
    (diagnostic,) = refused(text)
    assert diagnostic.code is code and says in diagnostic.message and diagnostic.span.line == line
    if "weight = 2.0" in text:
        assert "[[data.source]]" in diagnostic.cure


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s-{00..02}.tar", ["s-00.tar", "s-01.tar"]),
        ("{s,t}-01.tar", ["s-01.tar", "t-01.tar"]),
        ("s-[0]0.tar", ["s-00.tar"]),
        ("?-{01..01}.{tar,zip}", ["s-01.tar", "t-01.tar"]),
        ("s-{a}.tar", []),
    ],
)
def test_braces_in_names_of_shards(tmp_path, pattern, names):
    for name in ("s-00.tar", "s-01.tar", "t-01.tar"):
        (tmp_path / name).touch()
    assert [f.name for f in matching_files(tmp_path, pattern)] == names
