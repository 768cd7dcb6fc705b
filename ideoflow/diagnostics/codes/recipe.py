"""Codes of recipes."""
from ideoflow.diagnostics.codes import define
