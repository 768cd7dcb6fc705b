"""report.html: good HTML, complete in itself, everything escaped, and the figures are the run's."""

import ast
import base64
import errno
import hashlib
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ideoflow.diagnostics import IdeoflowError
from ideoflow.plan.document import Ledger
from ideoflow.report.html import write_report

VOID = {"br", "col", "hr", "img", "input", "link", "meta"}
HOSTILE = "</script></style></title>\"'><img src=x onerror=alert(1)><!-- \ud800\x00\u202e &amp; {{7*7}}"
# How a parser gives it back: what no page can carry is replaced.
HARMLESS = HOSTILE.replace("\ud800", "\ufffd").replace("\x00", "\ufffd")


class Page(HTMLParser):
    """A page's elements and words; refuses tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words, self.raw = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.raw.setdefault(self.open[-1], []).append(data)
        else:
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def text_of(run, plan=None):
    return write_report(run.folder, plan or run.plan).read_text(encoding="utf-8")


def page_of(run, plan=None):
    return Page(text_of(run, plan))


def drawings(text):
    """Every outermost SVG, read by an XML parser."""
    found = re.findall(
        r'<svg [^>]*role="img".*?</svg>(?:(?!<svg).)*?</svg>|<svg [^>]*bars.*?</svg>', text, re.S
    )
    return [ElementTree.fromstring(svg) for svg in found]


# A whole run ----------------------------------------------------------------------------------------------


def test_the_page_is_balanced_and_loads_nothing(finished):
    text = text_of(finished)
    page = Page(text)
    assert not re.search(r"https?:|//\w|url\(|@import", re.sub(r"base64,[\w+/=]+|hf://", "", text))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") or name == "style" for name in attributes), (
            "inline handler or style"
        )
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:image/jpeg;base64,")) or not value
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"].removeprefix("#") for a in page.all("a")}
    assert links and links <= set(ids)


def test_the_policy_admits_exactly_the_pages_own_style_and_script(finished):
    page = page_of(finished)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    digests = [
        base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        for block in (*page.raw["style"], page.raw["script"][-1])
    ]
    style, script = digests
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'"
    )


def test_the_headline_tells_the_run(finished):
    text = page_of(finished).text
    for words in (
        "quickstart",
        "Finished: 300 of 300 steps",
        "base nano",
        "1 min 46 s",
        "915 MiB",
        "1.24 MiB",
    ):
        assert words in text


def test_pictures_stand_side_by_side_with_the_steps_between(finished):
    page = page_of(finished)
    images = page.all("img")
    assert len(images) == 3 * 7
    first = [i["alt"] for i in images[:7]]
    assert first == ["cat-with-cup, before training", "cat-with-cup, after 300 steps"] + [
        f"cat-with-cup, step {s}" for s in (50, 100, 150, 200, 250)
    ]
    for image in images:
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        picture.load()
        assert picture.size == (int(image["width"]), int(image["height"]))
    assert "seed 44" in page.text and "KAFFEE" in page.text and '"bbox": [120, 300, 760, 760]' in page.text


def test_drawings_are_xml_with_titles_ticks_and_numbers_that_are_finite(finished):
    text = text_of(finished)
    found = drawings(text)
    assert len(found) == text.count('role="img"') == 6
    for svg in found:
        assert svg.find("title").text and svg.get("aria-labelledby")
        assert sum(t.get("class") == "tick" for t in svg.iter("text")) >= 4
        assert any(t.get("class") == "label" for t in svg.iter("text"))
        for element in svg.iter():
            assert not re.search(r"nan|inf", " ".join(element.attrib.values()), re.I)


def test_memory_and_time_stand_against_their_predictions(finished):
    text = page_of(finished).text
    assert "Training 880 MiB 915 MiB +4 %" in text
    assert "Loading the model – 760 MiB –" in text
    assert "whole process (RSS)" in text
    assert "7 of 12 predicted lines not yet corrected" in text
    assert "34 s predicted, 36.1 s measured" in text
    assert "The plan expected 113 ms a step" in text


def test_a_gpu_run_says_what_its_allocator_held(finished):
    plan = replace(finished.plan, hardware=replace(finished.plan.hardware, kind="cuda", name="GPU"))
    text = page_of(finished, plan).text
    assert "allocator" in text and "RSS" not in text and '.to("cuda")' in text


def test_decisions_warnings_settings_and_versions(finished):
    text = page_of(finished).text
    for words in (
        "precision float32 the planner This CPU has no fast bf16 arithmetic.",
        "not bf16 : slower here (−11.0 MiB at the peak, +84 ms a step)",
        "compile off your recipe",
        "IP005 two captions name no colours quickstart.toml:5:1 Cure: add a palette",
        "cleared an unfinished checkpoint",
        "[train.schedule]",
        "2.13.0+cpu",
    ):
        assert words in text
    raw = text_of(finished)
    assert "<b>0.002</b>" in raw and "<code>1.5</code>" in raw, "set, and left at its default"


@pytest.mark.parametrize(
    ("value", "extra", "words"),
    [
        ("loaded", "", "true asymmetric guidance"),
        ("streamed", "", "true asymmetric guidance"),
        ("proxy", "", "proxy guidance"),
        ("loaded", "guidance = 1.0", "no unconditional velocity takes part"),
        ("proxy", "guidance = 4.5\nsteps = 6", "6 steps, guidance 4.5, proxy guidance"),
    ],
)
def test_the_guidance_that_was_used_is_said(run, plan_with, value, extra, words):
    decisions = [replace(d, value=value) if d.id == "unconditional" else d for d in run.plan.decisions]
    plan = replace(plan_with(extra), decisions=tuple(decisions))
    run.sample(0, "cat", 0.0, 3)
    assert words in page_of(run, plan).text


def test_the_snippet_is_python_whatever_the_names_are(finished):
    finished.write("end", step=300, finished=True, adapter='it\'s "quoted".safetensors', seconds=1)
    (finished.folder / 'it\'s "quoted".safetensors').write_bytes(b"x")
    page = page_of(finished)
    code = next(w for w in page.words if w.startswith("from pathlib"))
    strings = {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)}
    assert 'it\'s "quoted".safetensors' in strings and "cache/nano-1" in strings


# Hostile and broken input ---------------------------------------------------------------------------------


def test_nothing_from_outside_becomes_markup(run):
    plan = replace(
        run.plan,
        name=HOSTILE,
        recipe_path=HOSTILE,
        hardware=replace(run.plan.hardware, name=HOSTILE),
        base=replace(run.plan.base, name=HOSTILE),
        decisions=tuple(
            replace(d, value=HOSTILE, reason=HOSTILE, evidence=HOSTILE) for d in run.plan.decisions
        ),
        ledger=Ledger(tuple(replace(line, name=HOSTILE, evidence=HOSTILE) for line in run.plan.ledger.lines)),
        warnings=tuple(
            replace(w, message=HOSTILE, cure=HOSTILE, notes=(HOSTILE,)) for w in run.plan.warnings
        ),
    )
    run.write("run", version=HOSTILE, torch=HOSTILE, device=HOSTILE, from_step=0, seed=0)
    run.write("stage", stage=HOSTILE, seconds=1.0, peak_bytes=5)
    run.write("note", text=HOSTILE)
    run.steps(1, 3)
    for step, caption in (
        (0, HOSTILE),
        (2, json.dumps({"high_level_description": HOSTILE, HOSTILE: HOSTILE})),
    ):
        run.write("sample", step=step, prompt=HOSTILE, file=HOSTILE, caption=caption)
    text = text_of(run, plan)
    page = Page(text)
    assert page.all("img") == [] and len(page.all("script")) == 2 and len(page.all("style")) == 1
    assert "alert(1)>" not in text and "<!--" not in text
    assert "".join(page.words).count(HARMLESS) > 20, "it is shown, as text"
    for svg in drawings(text):
        assert svg.find("title").text


def test_a_picture_outside_the_folder_is_not_taken_in(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    run.write("sample", step=0, prompt="a", file="../private.png")
    run.write("sample", step=1, prompt="a", file=str(tmp_path / "private.png"))
    page = page_of(run)
    assert page.all("img") == [] and page.text.count("lies outside the run's folder") == 2


def test_missing_and_damaged_pictures_leave_a_place(run):
    run.sample(0, "cat", 0.0, 3)
    run.sample(10, "cat", 0.5, 3)
    run.sample(20, "cat", 1.0, 3)
    (run.folder / "samples/cat-000010.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    (run.folder / "samples/cat-000020.png").unlink()
    page = page_of(run)
    assert len(page.all("img")) == 1
    assert "cat-000020.png is missing" in page.text and "cat-000010.png cannot be read" in page.text


def test_a_run_of_which_nothing_is_recorded(run):
    text = page_of(run).text
    assert "Nothing has been recorded" in text and "No step has been recorded" in text
    assert "No picture was made" in text


def test_one_step_and_no_figures(run):
    run.start()
    run.write("step", step=1, loss=None, learning_rate=None, grad_norm=None, seconds=None)
    text = text_of(run)
    assert "1 step whose loss was not a number" in Page(text).text
    assert len(drawings(text)) == 3, "loss, and what was predicted; the rest has nothing to draw"


def test_lost_losses_are_marked(run):
    run.start()
    run.steps(1, 40)
    run.write("step", step=41, loss=float("nan"), learning_rate=1e-3, grad_norm=float("inf"), seconds=0.1)
    text = text_of(run)
    assert "1 step whose loss was not a number, first step 41" in Page(text).text
    lost = [t for svg in drawings(text) for t in svg.iter("text") if t.get("class") == "lost"]
    assert len(lost) == 1 and lost[0].find("title").text == "step 41: not a number"


def test_an_interrupted_run_says_how_to_go_on(run):
    run.start()
    run.steps(1, 30)
    run.write("checkpoint", step=25, file="c")
    assert (
        "still running, or cut off; `ideoflow run recipes/quickstart.toml` goes on from step 25"
        in page_of(run).text
    )
    run.end(30, finished=False)
    assert "Stopped after 30 of 300 steps" in page_of(run).text


def test_many_prompts_and_steps_stay_a_small_page(run):
    for prompt in range(60):
        for step in range(0, 12 if prompt == 0 else 2):
            run.sample(step, f"prompt-{prompt:02}", step / 12, prompt)
    file = write_report(run.folder, run.plan)
    page = Page(file.read_text(encoding="utf-8"))
    assert "12 more prompts left out" in page.text
    assert "8 of the 10 pictures in between are shown" in page.text
    assert len(page.all("img")) == 48 * 2 + 8


def test_large_pictures_are_made_smaller(run):
    file = run.folder / "big.png"
    Image.effect_noise((2000, 1000), 80).save(file)
    run.write("sample", step=0, prompt="big", file="big.png")
    (image,) = page_of(run).all("img")
    assert (image["width"], image["height"]) == ("768", "384")


def test_home_folders_are_not_shown(run, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USERPROFILE", "/home/somebody")
    plan = replace(run.plan, recipe_path="/home/somebody/r.toml")
    text = text_of(run, plan)
    assert "somebody" not in text and "~/r.toml" in text


def test_a_folder_that_is_gone_is_a_diagnostic(run):
    shutil.rmtree(run.folder)
    with pytest.raises(IdeoflowError, match="IA001"):
        write_report(run.folder, run.plan)


def test_a_full_disk_leaves_the_old_report(finished, monkeypatch):
    before = text_of(finished)

    def full(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(IdeoflowError, match=r"IA001.*No space left"):
            write_report(finished.folder, finished.plan)
    assert (finished.folder / "report.html").read_text(encoding="utf-8") == before


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_the_script_runs_in_a_browser(finished, tmp_path):
    file = write_report(finished.folder, finished.plan)
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "dump-dom"]
    command = [BROWSER, *(f"--{flag}" for flag in flags), f"--user-data-dir={tmp_path}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    # The script adds these, so it parsed, passed the page's policy and found its elements.
    assert done.stdout.count('type="range"') == 3 and done.stdout.count("<output") == 4
