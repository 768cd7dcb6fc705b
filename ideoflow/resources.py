"""Finds the folders that ship beside the code: ``grammar/``, ``schemas/`` and ``recipes/``.

In a checkout they lie at the top level; in a wheel, under ``ideoflow/_data``. Knows the user's cache folder
too, and how to write a file so that it is never half there.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


@cache
def data_root() -> Path:
    """The folder that holds ``grammar``, ``schemas`` and ``recipes``."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "grammar").is_dir():
        return checkout
    return _PACKAGE / "_data"


def grammar(name: str) -> str:
    """Text of a grammar file, for example ``caption.lark``."""
    return (data_root() / "grammar" / name).read_text(encoding="utf-8")


def schema(name: str) -> str:
    """Text of a JSON Schema, for example ``recipe`` for ``recipe.schema.json``."""
    return (data_root() / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")


def recipes() -> Path:
    """The folder of shipped recipes."""
    return data_root() / "recipes"


def user_cache() -> Path:
    """Where things are kept between runs: ``$IDEOFLOW_CACHE``, else ``ideoflow`` in the user's own."""
    chosen = os.environ.get("IDEOFLOW_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ideoflow"


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A scratch path to write: the file is there whole after the block or not at all, even if the power goes.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are for their owner only, and renaming keeps that.
    scratch = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        yield scratch
        with scratch.open("rb+") as stream:
            os.fsync(stream.fileno())
        scratch.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder to fill: the folder is there whole after the block or not at all.

    It may be there before, empty. Files in it are synchronised by whoever writes them.

    Raises:
        OSError: as :func:`whole_file`; also when the folder is there and holds something.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    scratch.mkdir()
    try:
        yield scratch
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all; raises like :func:`whole_file`."""
    with whole_file(file) as scratch:
        scratch.write_bytes(content)
