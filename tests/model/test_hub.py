"""What the hub's client raises becomes a diagnostic with the page to go to; nothing is downloaded here."""

from importlib import import_module

import pytest
from huggingface_hub import errors

from ideoflow.diagnostics import IdeoflowError, Span
from ideoflow.diagnostics.codes import model as codes
from ideoflow.model.base import COMPONENTS, locate_base
from ideoflow.model.hub import fetch_base

# The HTTP library that this version of the client is built on: httpx, or its successor.
httpx = import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
SPAN = Span("recipe.toml", 2, 8, 2, 20, 'base = "owner/name"')


@pytest.fixture
def absent(monkeypatch, tmp_path):
    """A hub id that is not on this disk."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return locate_base("owner/name", span=SPAN)


@pytest.fixture
def listed(monkeypatch):
    """The hub says that it has the parts of a base."""
    names = ["model_index.json", *(f"{part}/config.json" for part in COMPONENTS)]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: names)


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/owner/name"))


RAISED = {
    "gated": (errors.GatedRepoError("403", response=response(403)), codes.NO_ACCESS, "accept the licence on"),
    "unknown": (errors.RepositoryNotFoundError("404", response=response(404)), codes.NOT_A_BASE, "private"),
    "revision": (errors.RevisionNotFoundError("404", response=response(404)), codes.NO_DOWNLOAD, "/commits"),
    "server": (errors.HfHubHTTPError("500", response=response(500)), codes.NO_DOWNLOAD, "resumes"),
    "offline": (errors.LocalEntryNotFoundError("offline"), codes.NO_DOWNLOAD, "local folder"),
    "switched off": (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE"), codes.NO_DOWNLOAD, "connection"),
    "cut": (httpx.ReadTimeout("timed out"), codes.NO_DOWNLOAD, "resumes"),
    "full": (OSError(28, "No space left on device"), codes.NO_DOWNLOAD, "free disk space"),
    "storage": (RuntimeError("Data processing error: CAS service error"), codes.NO_DOWNLOAD, "resumes"),
    "name": (errors.HFValidationError("too long"), codes.NOT_A_BASE, "owner/name"),
    "silent": (ConnectionError(), codes.NO_DOWNLOAD, "connection"),
}


@pytest.mark.parametrize("name", RAISED)
def test_a_failed_download_is_told(name, absent, listed, monkeypatch):
    raised, code, cure = RAISED[name]

    def snapshot_download(*_, **__):
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(IdeoflowError) as caught:
        fetch_base(absent, "v2", span=SPAN)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code is code and diagnostic.span is SPAN
    assert "owner/name" in diagnostic.message and cure in diagnostic.cure
    assert caught.value.__suppress_context__, "no traceback of the client's own"


def test_the_licence_page_is_named(absent, listed, monkeypatch):
    def snapshot_download(*_, **__):
        raise RAISED["gated"][0]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(IdeoflowError, match="gated") as caught:
        fetch_base(absent)
    assert "https://huggingface.co/owner/name" in caught.value.diagnostics[0].cure
    assert "hf auth login" in caught.value.diagnostics[0].cure


def test_no_network_at_all(absent):
    """With the client itself: the tests run with HF_HUB_OFFLINE."""
    with pytest.raises(IdeoflowError) as caught:
        fetch_base(absent, span=SPAN)
    assert caught.value.diagnostics[0].code is codes.NO_DOWNLOAD


def test_what_was_downloaded_is_read(absent, listed, copy, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    said = []
    facts = fetch_base(absent, "abc", say=said.append)
    assert facts.present and facts.folder == copy and facts.name == "owner/name"
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc") and said == ["downloading owner/name"]
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])


def test_what_was_downloaded_may_be_no_base(absent, listed, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(IdeoflowError) as caught:
        fetch_base(absent, span=SPAN)
    assert caught.value.diagnostics[0].code is codes.UNSUPPORTED_FORM


def test_a_base_that_is_present_is_not_fetched(nano_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    facts = locate_base(str(nano_folder))
    assert fetch_base(facts) is facts
