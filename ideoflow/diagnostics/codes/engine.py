"""Codes of engine."""
