"""Codes of model."""
