"""Codes of captions. IC1xx-IC3xx: the language; IC4xx-IC6xx: JSON, rules and checks; IC7xx: the tools."""

from ideoflow.diagnostics.codes import caption_json, caption_language, caption_tools

__all__ = ["caption_json", "caption_language", "caption_tools"]
