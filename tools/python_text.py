"""Writes the source text of Python's standard library to one file, as training text for models of code.

    python -m tools.python_text OUT.txt

The modules are those of the interpreter that runs it, without packages.
"""

import argparse
import sysconfig
from pathlib import Path


def main() -> None:
    """Write the modules of the standard library's top folder, in the order of their names."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.python_text", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="text file to write")
    out = parser.parse_args().out
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n\n".join(module.read_text(encoding="utf-8", errors="replace") for module in modules)
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
