"""Codes of data."""
