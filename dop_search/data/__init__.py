"""Validation sets: rendered by this project, or read from files."""
