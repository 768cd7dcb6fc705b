"""The pictures of a source: a folder, lists, WebDataset shards, or a data set on the hub (torch-free)."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ideoflow.data.memory import FileMemory, stamps
from ideoflow.data.pictures import PICTURE_SUFFIXES, UNREAD_SUFFIXES, TarMember, find_pictures, visible_files
from ideoflow.data.tables import read_list
from ideoflow.data.texts import CAPTION_SUFFIXES, Entry, Text, sidecar_texts
from ideoflow.diagnostics import Collector, Diagnostic, IdeoflowError, Span, fail
from ideoflow.diagnostics.codes.data import BAD_LIST, EMPTY_DATASET, NO_HUB_DATASET, NOT_READ
from ideoflow.model.download import snapshot
from ideoflow.recipe import Recipe, SourceSettings
from ideoflow.recipe.sources import HUB_PREFIX, SHARD_SUFFIX, TABLE_SUFFIXES, is_folder, matching_files
from ideoflow.resources import user_cache

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True, slots=True)
class Found:
    """What a source has; names of its entries are relative to ``root``."""

    root: Path
    entries: list[Entry]


def find_entries(
    recipe: Recipe, number: int, problems: Collector, say: Callable[[str], None] = lambda _: None
) -> Found:
    """Every picture of one source, in an order that is the same each time.

    Raises:
        IdeoflowError: when there is none, or a list or shard cannot be read.
    """
    source = recipe.tables.data.sources[number]
    span = recipe.source_span(number, "images")
    root, files = _locate(recipe.folder, source.images, span, say)
    if not files:
        files_there = list(visible_files(root))
        found = Found(root, _folder(root, find_pictures(files_there), source, problems))
        _report_unread((p.name for p in files_there), span, problems)
    elif files[0].suffix.lower() == SHARD_SUFFIX:
        found = Found(root, [e for file in files for e in _shard(file, root, source, problems)])
        _report_unread((name for file in files for name, _, _ in _members(file)), span, problems)
    else:
        beside = recipe.folder / source.image_folder if source.image_folder else None
        listed = (e for file in files for e in _listed(file, source, beside or file.parent, problems))
        found = Found(root, list(listed))
    if not found.entries and not problems.errors:
        known = ", ".join(sorted(PICTURE_SUFFIXES))
        what = f"no pictures in {root}" if not files else f"no pictures in {source.images}"
        problems.add(
            EMPTY_DATASET,
            f"there are {what}",
            span,
            cure=f"put pictures there ({known}), or name another folder",
        )
    return found


def _report_unread(names: Iterable[str], span: Span, problems: Collector) -> None:
    """Tells of pictures of kinds that are not read, which nobody would miss otherwise."""
    suffixes = ("." + name.rpartition(".")[2].lower() for name in names)
    if unread := Counter(suffix for suffix in suffixes if suffix in UNREAD_SUFFIXES):
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(unread.items()))
        cure = "make JPEG, PNG or WebP of them, or take them away"
        problems.add(NOT_READ, f"files of these kinds are left out: {kinds}", span, cure=cure)


def _locate(folder: Path, images: str, span: Span, say: Callable[[str], None]) -> tuple[Path, list[Path]]:
    """(folder that names are relative to, its lists or shards; none where it is a folder of pictures)."""
    if not images.startswith(HUB_PREFIX):
        if is_folder(folder / images):
            return folder / images, _files_of(folder / images)
        files = matching_files(folder, images)
        return (files[0].parent if files else folder / images), files
    name, _, pattern = _split_hub(images.removeprefix(HUB_PREFIX))
    repository, _, revision = name.partition("@")
    kinds = [f"*{suffix}" for suffix in (*TABLE_SUFFIXES, SHARD_SUFFIX, *PICTURE_SUFFIXES, *CAPTION_SUFFIXES)]
    say(f"downloading {repository}")
    root = snapshot(
        repository,
        revision or None,
        kind="dataset",
        patterns=[pattern] if pattern else kinds,
        span=span,
        missing=NO_HUB_DATASET,
    )
    if not pattern:
        return root, _files_of(root)
    files = matching_files(root, pattern)
    if not files:
        cure = f"see https://huggingface.co/datasets/{repository}/tree/main"
        fail(NO_HUB_DATASET, f"{repository} has no file that matches '{pattern}'", span, cure=cure)
    return root, files


def _split_hub(rest: str) -> tuple[str, str, str]:
    """(owner/name@revision, '/', pattern inside)."""
    parts = rest.split("/", 2)
    return "/".join(parts[:2]), "/", parts[2] if len(parts) > 2 else ""


def _files_of(folder: Path) -> list[Path]:
    """The shards or parquet files of a folder that holds no pictures of its own, sorted; a train split first.

    Where the names tell splits apart, as Hugging Face writes them, only the training split counts.
    """
    if any(p.suffix.lower() in PICTURE_SUFFIXES for p in folder.rglob("*")):
        return []
    for suffix in (SHARD_SUFFIX, ".parquet"):
        files = sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file())
        if files:
            train = [p for p in files if "train" in p.relative_to(folder).as_posix().lower()]
            return train or files
    return []


def _folder(root: Path, pictures: list[Path], source: SourceSettings, problems: Collector) -> list[Entry]:
    """Pictures of a folder; where it has a metadata file of Hugging Face's imagefolder, with its captions."""
    entries = {p: Entry(p, p.relative_to(root).as_posix()) for p in pictures}
    if source.caption in ("auto", "column"):
        parents = {p.parent for p in entries}
        folders = parents | {f for p in parents for f in p.parents if f.is_relative_to(root)}
        lists = [f / name for f in sorted(folders) for name in METADATA if (f / name).is_file()]
        for listed in (entry for file in lists for entry in _listed(file, source, file.parent, problems)):
            picture = listed.picture
            if not isinstance(picture, Path) or picture not in entries:
                continue
            if source.caption == "column" or not _has_sidecar(picture):
                entries[picture] = Entry(picture, entries[picture].name, listed.texts)
    return list(entries.values())


def _has_sidecar(picture: Path) -> bool:
    return any(picture.with_suffix(suffix).is_file() for suffix in CAPTION_SUFFIXES)


def _listed(file: Path, source: SourceSettings, root: Path, problems: Collector) -> Iterator[Entry]:
    for found in read_list(file, source, root):
        if isinstance(found, Diagnostic):
            problems.extend([found])
            if len(problems.errors) >= problems.limit:
                problems.raise_if_errors()
        else:
            yield found


def _shard(file: Path, root: Path, source: SourceSettings, problems: Collector) -> Iterator[Entry]:
    """Pictures of a tar file with the captions under their names: NAME.jpg with NAME.icap, .json or .txt."""
    members = _members(file)
    pictures: list[tuple[str, tuple[str, int, int]]] = []
    texts: dict[str, dict[str, tuple[str, int, int]]] = {}
    for member in members:
        path = PurePosixPath(member[0])
        suffix, key = path.suffix.lower(), path.with_suffix("").as_posix()
        if path.name.startswith("."):
            continue
        if suffix in PICTURE_SUFFIXES:
            pictures.append((key, member))
        elif suffix in CAPTION_SUFFIXES:
            texts.setdefault(key, {})[suffix] = member
    for key, (name, offset, length) in pictures:
        picture = TarMember(file, name, offset, length)
        inside = f"{file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name}/{name}"
        found: tuple[Text, ...] = ()
        if source.caption in ("auto", "sidecar", "column"):
            try:
                found = _shard_texts(file, texts.get(key, {}), source)
            except IdeoflowError as error:
                problems.extend(error.diagnostics)
                continue
        yield Entry(picture, inside, found)


def _shard_texts(
    file: Path, members: dict[str, tuple[str, int, int]], source: SourceSettings
) -> tuple[Text, ...]:
    for suffix in (".json",) if source.caption == "column" else CAPTION_SUFFIXES:
        if suffix not in members:
            continue
        name, offset, length = members[suffix]
        place = Span(f"{file}/{name}")
        try:
            with TarMember(file, name, offset, length).open() as stream:
                text = stream.read().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
            fail(BAD_LIST, f"{name} in {file.name} cannot be read: {reason}", place, cure="write it as UTF-8")
        if suffix == ".json":
            texts = sidecar_texts(text, source.caption_column, place)
            if isinstance(texts, Diagnostic):
                raise IdeoflowError(texts)
            if texts is not None:
                return texts
        return (Text(text, ".json" if text.lstrip().startswith("{") else suffix, place),)
    return ()


def _members(file: Path) -> list[tuple[str, int, int]]:
    """(name, offset, length) of every file in a tar; remembered while the tar does not change."""
    memory, name = FileMemory("members", user_cache() / "files.sqlite"), str(file.absolute())
    version = stamps([file])
    if (known := memory.get([name], version)[0]) is not None:
        return [(str(name), int(offset), int(length)) for name, offset, length in known]
    try:
        with tarfile.open(file, "r:") as tar:
            members = [(m.name, m.offset_data, m.size) for m in tar if m.isfile() and not m.issparse()]
    except (OSError, tarfile.TarError) as error:
        cure = "shards are plain, uncompressed tar files"
        fail(BAD_LIST, f"{file} cannot be read: {error}", Span(str(file)), cure=cure)
    memory.put([(name, version[0], members)])
    return members
