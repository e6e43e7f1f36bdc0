"""Readers of the forms that meta-files come in."""
