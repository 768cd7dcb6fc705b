"""Damages a copy of a base, and holds inspecting and reading it to the same refusal."""

import json

import pytest
from safetensors.torch import load_file, save_file

from ideoflow.diagnostics import IdeoflowError, Span
from ideoflow.diagnostics.codes import model as codes
from ideoflow.model.base import locate_base
from ideoflow.model.inspect import inspect

SPAN = Span("recipe.toml", 2, 8, 2, 14, 'base = "base"')


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))


def store(folder, part, tensors):
    file = weights(folder, part)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def edit(folder, part, change):
    """Stores a part's tensors as ``change`` makes them of what they were."""
    tensors = load_file(weights(folder, part))
    return store(folder, part, {k: v.contiguous() for k, v in change(tensors).items()})


def configure(folder, part, within=None, **changes):
    """Sets entries of a part's configuration, or of the object ``within`` it."""
    file = folder / part / "config.json"
    config = json.loads(file.read_text())
    (config[within] if within else config).update(changes)
    file.write_text(json.dumps(config))
    return file


def refused(folder, *wanted, code=codes.WRONG_WEIGHTS):
    """Both refuse it, in the same words; the base's reader points at the recipe."""
    with pytest.raises(IdeoflowError) as caught:
        locate_base(str(folder), span=SPAN)
    (read,) = caught.value.diagnostics
    try:
        (inspected,) = inspect(folder).problems
    except IdeoflowError as error:
        (inspected,) = error.diagnostics
    assert (read.code, read.message) == (inspected.code, inspected.message)
    assert read.code is code and read.span is SPAN and read.cure
    for text in wanted:
        assert str(text) in read.message
