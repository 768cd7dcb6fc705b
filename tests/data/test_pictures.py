"""Pictures inside tar and parquet files: the same bytes as outside of them, in any order."""

import pickle
import random
import tarfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from ideoflow.captions.boxes import Geometry
from ideoflow.data.pictures import ParquetCell, TarMember, picture_digest
from ideoflow.data.pixels import load_pixels
from ideoflow.data.survey import Sample
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import data as codes


@pytest.fixture
def files(picture, tmp_path):
    made = []
    for n in range(9):
        made.append(tmp_path / f"{n}.png")
        picture(20 + n, 30, seed=n).save(made[-1])
    return made


@pytest.fixture
def tar_members(files, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in files:
            tar.add(file, file.name)
    with tarfile.open(tmp_path / "a.tar") as tar:
        return [TarMember(tmp_path / "a.tar", m.name, m.offset_data, m.size) for m in tar.getmembers()]


@pytest.fixture
def cells(files, tmp_path):
    content = [f.read_bytes() for f in files]
    table = pyarrow.table({"n": range(9), "image": [{"bytes": c, "path": "x"} for c in content]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    return [ParquetCell(tmp_path / "a.parquet", "image.bytes", n // 4, n % 4) for n in range(9)]


@pytest.mark.parametrize("kind", ["tar_members", "cells"])
def test_the_same_pixels_in_any_order(files, kind, request):
    stored = list(zip(files, pickle.loads(pickle.dumps(request.getfixturevalue(kind))), strict=True))
    random.Random(0).shuffle(stored)
    for file, packed in stored:
        size = (int(file.stem) + 20, 30)
        loaded = [load_pixels(Sample(p, size, Geometry(*size), "")) for p in (file, packed)]
        assert (loaded[0] == loaded[1]).all()
        assert picture_digest(file) == picture_digest(packed)


@pytest.mark.parametrize("kind", ["tar_members", "cells"])
def test_a_file_that_was_cut_is_told(kind, request, tmp_path):
    packed = request.getfixturevalue(kind)
    for file in (tmp_path / "a.tar", tmp_path / "a.parquet"):
        if file.exists():
            file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(IdeoflowError) as caught:
        load_pixels(Sample(packed[-1], (64, 64), Geometry(28, 30), ""))
    assert caught.value.diagnostics[0].code is codes.BAD_PICTURE


def test_a_mirrored_sample_has_the_mirrored_pixels(files):
    plain, mirrored = (
        load_pixels(Sample(files[0], (10, 12), Geometry(20, 30, (3, 4, 13, 16), flip=f), "")).numpy()
        for f in (False, True)
    )
    assert (np.flip(plain, 2) == mirrored).all() and not (plain == mirrored).all()
