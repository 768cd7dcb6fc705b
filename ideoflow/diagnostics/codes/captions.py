"""Codes of captions."""
