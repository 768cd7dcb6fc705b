"""Codes of artifacts."""
