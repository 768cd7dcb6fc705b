"""Brings a repository of the Hugging Face hub onto this disk, with every way to fail told (torch-free)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes.model import NO_ACCESS, NO_DOWNLOAD, NOT_A_BASE

# What a repository's kind is called in a recipe.
_SETTINGS = {"model": "model.base", "dataset": "data.images"}


def snapshot(
    name: str,
    revision: str | None,
    *,
    kind: Literal["model", "dataset"],
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
    from huggingface_hub import get_token, is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    local = f"give a local folder as {_SETTINGS[kind]}"
    try:
        files = snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(patterns))
        return Path(files)
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
