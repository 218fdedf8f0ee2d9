"""Writes the generated parts of README.md, docs/benchmarks.md and the shipped artifact's card: the settings table from
the schema, the figures from the results files.

python tools/readme.py            # rewrite
python tools/readme.py --check    # exit 1 if a page is not up to date
"""

import json
import re
import sys
from collections.abc import Callable, Sequence

import auto_tables
import peer_tables
import quality_tables
import speed_tables
import step_tables
from results import ROOT, table

CARD = ROOT / "vllm_buddy" / "artifacts" / "smollm2-135m" / "README.md"


def main() -> int:
    stale = False
    for path, names in PAGES.items():
        old = path.read_text()
        new = generate(old, names, path.name)
        stale |= old != new
        if "--check" not in sys.argv[1:]:
            path.write_text(new)
    return int(stale and "--check" in sys.argv[1:])


def generate(text: str, names: Sequence[str], page: str) -> str:
    """`text` with the parts between the markers made anew."""
    for name in names:
        pattern = re.compile(rf"(<!-- begin {name} .*?-->\n).*?(<!-- end {name} -->)", re.DOTALL)
        body = SECTIONS[name]().rstrip() + "\n"
        text, found = pattern.subn(lambda m, body=body: m[1] + body + m[2], text)  # type: ignore[misc]
        if found != 1:
            raise SystemExit(f"{page} has {found} parts named {name}")
    return text


def settings_table() -> str:
    """One row per server setting."""
    from vllm_buddy.serving.settings import BuddySettings

    rows = []
    for name, field in BuddySettings.model_fields.items():
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        rows.append([f"`{name}`", default, str(field.description)])
    return "\n".join(table(["key", "default", "meaning"], rows))


SECTIONS: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "decode": speed_tables.decode_summary,
    "decode in full": speed_tables.decode_table,
    "prefill": speed_tables.prefill_table,
    "mixed": speed_tables.mixed_table,
    "serving": speed_tables.serving_summary,
    "serving in full": speed_tables.serving_table,
    "profile": step_tables.profile_table,
    "union": step_tables.union_table,
    "peers": peer_tables.peers_summary,
    "peers in full": peer_tables.peers_table,
    "capabilities": peer_tables.capabilities_table,
    "memory": speed_tables.memory_table,
    "quality": quality_tables.quality_table,
    "recipes": quality_tables.recipes_table,
    "static": quality_tables.static_table,
    "auto": auto_tables.auto_table,
    "overload": auto_tables.overload_table,
    "prices": auto_tables.prices_table,
}
PAGES = {
    ROOT / "README.md": [
        "settings",
        "decode",
        "prefill",
        "mixed",
        "serving",
        "peers",
        "memory",
        "quality",
        "recipes",
        "auto",
        "overload",
        "prices",
    ],
    ROOT / "docs" / "benchmarks.md": [
        "decode in full",
        "serving in full",
        "profile",
        "union",
        "peers in full",
        "capabilities",
        "static",
    ],
    CARD: ["quality"],
}

if __name__ == "__main__":
    sys.exit(main())
