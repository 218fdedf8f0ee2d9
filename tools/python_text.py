"""Writes the source text of Python's standard library to one file, as training text for models of code."""

import sys
import sysconfig
from pathlib import Path


def main() -> None:
    """Write the modules of the standard library's top folder, in the order of their names, to argv[1]."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/python_text.py OUT.txt")
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n\n".join(module.read_text(encoding="utf-8", errors="replace") for module in modules)
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
