"""Generates the tables of README.md and docs/ from the results files."""
