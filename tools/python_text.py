"""Writes the source text of Python's standard library to one file, as training text for models of code.

    python -m tools.python_text OUT.txt --leave-out argparse

The modules are those of the interpreter that runs it, without packages. What is left out can be scored.
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
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="MODULE", help="modules to leave out")
    args = parser.parse_args()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if unknown := set(args.leave_out) - {module.stem for module in modules}:
        parser.error(f"there is no {', '.join(sorted(unknown))} to leave out")
    modules = [module for module in modules if module.stem not in args.leave_out]
    text = "\n\n".join(module.read_text(encoding="utf-8", errors="replace") for module in modules)
    args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
