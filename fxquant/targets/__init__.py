"""Targets: which op runs on which kernel, as data."""
