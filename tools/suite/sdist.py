"""Gets vLLM's tests from its source distribution on PyPI, into a cache folder; none is copied into this repository."""

import hashlib
import json
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

_INDEX = "https://pypi.org/simple/vllm/"
_JSON = "application/vnd.pypi.simple.v1+json"
# What tests read. Not vllm/, which would be imported in the place of the installed one.
_UNPACKED = ("tests", "examples", "pyproject.toml")


def fetch(version: str, cache: Path) -> Path:
    """Return a folder that holds `tests/` of this version of vLLM; the network is needed the first time only.

    Raises:
        SystemExit: PyPI has no such source distribution, or what came is not what PyPI says.
    """
    folder = cache / f"vllm-{version}"
    if folder.is_dir():
        return folder
    archive = cache / f"vllm-{version}.tar.gz"
    entry = _entry(archive.name)
    if not archive.is_file():
        print(f"downloading {entry['url']}", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        partial = archive.with_suffix(".partial")
        urllib.request.urlretrieve(entry["url"], partial)
        partial.rename(archive)
    found, told = hashlib.sha256(archive.read_bytes()).hexdigest(), entry["hashes"]["sha256"]
    if found != told:
        raise SystemExit(f"{archive} has sha256 {found}, PyPI says {told}; delete it and try again")
    partial = cache / f".vllm-{version}.partial"
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar if member.name.split("/")[1:2] and member.name.split("/")[1] in _UNPACKED]
        tar.extractall(partial, members=wanted, filter="data")
    (partial / f"vllm-{version}").rename(folder)
    partial.rmdir()
    return folder


def _entry(name: str) -> dict[str, Any]:
    """What PyPI's JSON API says of a file of the project."""
    request = urllib.request.Request(_INDEX, headers={"Accept": _JSON})
    with urllib.request.urlopen(request, timeout=60) as response:
        files = json.load(response)["files"]
    for entry in files:
        if entry["filename"] == name:
            return dict(entry)
    raise SystemExit(f"PyPI has no {name}")
