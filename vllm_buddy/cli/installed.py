"""Versions of installed distributions, without importing them."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(distribution: str) -> str | None:
    """Version of `distribution`, None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
