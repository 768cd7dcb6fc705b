"""Recipes: one TOML file that says what to train; read into frozen dataclasses.

Every value keeps its place in the file, so that whatever goes wrong later (a folder that is empty, a rank
that does not fit) is told at the line that asked for it.
"""

from ideoflow.recipe.load import Recipe, load_recipe, parse_recipe
from ideoflow.recipe.settings import (
    AdapterSettings,
    CacheSettings,
    CaptionSettings,
    DataSettings,
    MemorySettings,
    ModelSettings,
    OutputSettings,
    PictureSettings,
    RecipeTables,
    ScheduleSettings,
    SourceSettings,
    TrainSettings,
    ValidateSettings,
)

__all__ = [
    "AdapterSettings",
    "CacheSettings",
    "CaptionSettings",
    "DataSettings",
    "MemorySettings",
    "ModelSettings",
    "OutputSettings",
    "PictureSettings",
    "Recipe",
    "RecipeTables",
    "ScheduleSettings",
    "SourceSettings",
    "TrainSettings",
    "ValidateSettings",
    "load_recipe",
    "parse_recipe",
]
