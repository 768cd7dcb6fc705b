"""Brings a base onto this disk: makes nano, downloads a hub id, leaves folders as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.model import NO_ACCESS, NO_DOWNLOAD, NOT_A_BASE
from ideoflow.model.base import NANO, PARTS, BaseFacts, read_base

_EVERYTHING = ["*.json", "*.safetensors", "tokenizer/*"]
# Beside a single file: the transformers' configurations, but not their gigabytes.
_PARTS_ONLY = ["*.json", *(f"{part}/*" for part in PARTS), "scheduler/*"]


def fetch_base(
    facts: BaseFacts,
    revision: str | None = None,
    *,
    span: Span | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> BaseFacts:
    """The same base with ``present`` true.

    Raises:
        IdeoflowError: when it cannot be had: gated, unknown, offline, disk full.
    """
    if facts.present:
        return facts
    source = facts.parts or facts.name
    if source == NANO:
        from ideoflow.model.nano import ensure_nano

        assert facts.folder is not None
        folder = ensure_nano(facts.folder, say)
        if facts.parts is None:
            return replace(facts, present=True)
    elif facts.parts is None:
        say(f"downloading {source}")
        folder = _download(source, _EVERYTHING, revision, span)
    else:
        say(f"downloading {', '.join(PARTS)} of {source}")
        folder = _download(source, _PARTS_ONLY, revision, span)
    return read_base(facts.name, folder, span, files=facts.files, parts=facts.parts)


def _download(name: str, patterns: list[str], revision: str | None, span: Span | None) -> Path:
    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{name}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        if get_token() is None:
            cure = f"`hf auth login` (or set HF_TOKEN), and accept the licence on {page} with that account"
            fail(NO_ACCESS, f"{name} is gated, and there is no token to show", span, cure=cure)
        cure = f"accept the licence on {page} with the account of your token (`hf auth whoami` names it)"
        fail(NO_ACCESS, f"{name} is gated, and your token may not read it", span, cure=cure)
    except RevisionNotFoundError:
        fail(NO_DOWNLOAD, f"{name} has no revision '{revision}'", span, cure=f"see {page}/commits")
    except RepositoryNotFoundError:
        cure = "check the name; a private repository needs `hf auth login`; or give a local folder"
        fail(NOT_A_BASE, f"the hub has no model '{name}' that you can see", span, cure=cure)
    except HFValidationError as error:
        fail(NOT_A_BASE, f"'{name}' is not a hub id: {error}", span, cure="write it as 'owner/name'")
    except OfflineModeIsEnabled:
        cure = "unset HF_HUB_OFFLINE where there is a connection, or give a local folder as model.base"
        fail(NO_DOWNLOAD, f"{name} is not on this disk, and HF_HUB_OFFLINE is set", span, cure=cure)
    except LocalEntryNotFoundError:
        cure = "check the connection and try again (it resumes), or give a local folder as model.base"
        fail(NO_DOWNLOAD, f"{name} is not on this disk and the hub cannot be reached", span, cure=cure)
    except Exception as error:  # HTTP, TLS, disk: what is raised differs between versions of the hub's client
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = "check the connection and the free disk space; the next try resumes"
        fail(NO_DOWNLOAD, f"{name} could not be downloaded: {reason}", span, cure=cure)
