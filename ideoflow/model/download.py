"""Brings a repository of the Hugging Face hub onto this disk, with every way to fail told (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes.model import NO_ACCESS, NO_DOWNLOAD, NOT_A_BASE

Kind = Literal["model", "dataset"]
# What a repository's kind is called in a recipe.
_SETTINGS = {"model": "model.base", "dataset": "data.images"}


def snapshot(
    name: str,
    revision: str | None,
    *,
    kind: Kind,
    patterns: Sequence[str],
    span: Span | None = None,
    missing: Code = NOT_A_BASE,
) -> Path:
    """The local folder of a repository's files that match ``patterns``; downloads what is not here yet.

    Args:
        missing: the code for a repository that does not exist.

    Raises:
        IdeoflowError: gated, unknown, offline, disk full.
    """
    from huggingface_hub import snapshot_download

    with _told(name, revision, kind, span, missing):
        files = snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(patterns))
    return Path(files)


def repository_files(name: str, revision: str | None, *, span: Span | None = None) -> list[str]:
    """The names of a model's files on the hub, with their folders; raises like :func:`snapshot`."""
    from huggingface_hub import list_repo_files

    with _told(name, revision, "model", span, NOT_A_BASE):
        return sorted(list_repo_files(name, revision=revision))


def single_file(name: str, file: str, revision: str | None, *, span: Span | None = None) -> Path:
    """One file of a model on the hub, downloaded if it is not here yet; raises like :func:`snapshot`."""
    from huggingface_hub import hf_hub_download

    with _told(name, revision, "model", span, NOT_A_BASE, file):
        return Path(hf_hub_download(name, file, revision=revision))


@contextmanager
def _told(
    name: str, revision: str | None, kind: Kind, span: Span | None, missing: Code, file: str = ""
) -> Iterator[None]:
    """Turns what the hub's client raises into diagnostics."""
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    local = f"give a local {'file' if file else 'folder'} as {_SETTINGS[kind]}"
    try:
        yield
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
        fail(missing, f"the hub has no {kind} '{name}' that you can see", span, cure=cure)
    except RemoteEntryNotFoundError:
        fail(missing, f"{name} has no file '{file}'", span, cure=f"see {page}/tree/{revision or 'main'}")
    except HFValidationError as error:
        fail(missing, f"'{name}' is not a hub id: {error}", span, cure="write it as 'owner/name'")
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if isinstance(error, OfflineModeIsEnabled) or is_offline_mode():
            cure = f"unset HF_HUB_OFFLINE where there is a connection, or {local}"
            fail(NO_DOWNLOAD, f"{name} is not on this disk, and HF_HUB_OFFLINE is set", span, cure=cure)
        cure = f"check the connection and try again (it resumes), or {local}"
        fail(NO_DOWNLOAD, f"{name} is not on this disk and the hub cannot be reached", span, cure=cure)
    except Exception as error:  # HTTP, TLS, disk: what is raised differs between versions of the hub's client
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = "check the connection and the free disk space; the next try resumes"
        fail(NO_DOWNLOAD, f"{name} could not be downloaded: {reason}", span, cure=cure)
