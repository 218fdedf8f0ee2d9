"""Tests the comparison with peers: which systems it has, how they are checked, and its figures."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
from benchmarks.harness import engines
from benchmarks.harness.rounds import Refused, Rounds
from benchmarks.peers import compare, peer_lineup
from benchmarks.peers.greedy_check import LayersRun
from benchmarks.peers.peer_lineup import Answer, Peer

PROMPTS = [[1, 2, 3], [4, 5]]


def answering(token_ids: list[list[int]], seconds: float = 2.0, passes: int = 3) -> Any:
    return lambda prompts, tokens: Answer(token_ids, seconds, [passes] * len(prompts))


def peer(name: str, dense: str, **options: Any) -> Peer:
    options = {"ask": answering([[7] * 4, [8] * 4]), "run": LayersRun(), **options}
    return Peer(name=name, framework="any", layers=30, dense=dense, **options)


class Lenient:
    """Stands in for the checks of outputs: remembers its arguments, and refuses the peers that are named wrong."""

    def __init__(self, wrong: Sequence[str] = ()) -> None:
        self.wrong = wrong
        self.seen: list[str] = []

    def greedy(self, name: str, *_: object) -> None:
        self.seen.append(name)
        if name in self.wrong:
            raise Refused(f"'{name}' is wrong")

    def lineup(self, variants: Sequence[Any], prompts: object, rounds: Rounds) -> None:
        rounds.mark_checked([variant.name for variant in variants])


def run(
    compared: Sequence[Peer], num_rounds: int = 2, lenient: Lenient | None = None
) -> tuple[Rounds, dict[str, list[int]]]:
    lenient = lenient or Lenient()
    rounds = Rounds(num_rounds)
    lineup, greedy = SimpleNamespace(check=lenient.lineup), SimpleNamespace(check=lenient.greedy)
    agreed = compare.check(lineup, greedy, compared, PROMPTS, 4, rounds)
    compare.time_rounds(compared, [PROMPTS] * num_rounds, 4, rounds)
    return rounds, agreed


def test_tokens_per_second_leave_out_the_first_token() -> None:
    """Fails if prefill, which ends with the first token, counts as decoding."""
    answer = Answer([[7] * 4, [8] * 4], 2.0, [3, 3])
    assert answer.tokens_per_s == 3.0
    assert answer.accepted_per_step == 0.0


def test_accepted_drafts_are_tokens_beyond_one_a_pass() -> None:
    """Fails if requests that need fewer passes than others weigh more or less than by their passes."""
    assert Answer([[7] * 13, [8] * 13], 1.0, [4, 8]).accepted_per_step == 1.0


def test_rows_say_what_each_is_compared_with() -> None:
    """Fails if a ratio is to another loop than stock vLLM, or a loop's own plain decoding is forgotten."""
    compared = [
        peer("stock", "stock"),
        peer("dense", "dense", ask=answering([[7] * 4, [8] * 4], seconds=4.0)),
        peer("lookup", "dense", ask=answering([[7] * 4, [8, 8, 9, 9]], seconds=1.0, passes=1), drafts=True),
    ]
    rounds, agreed = run(compared)
    rows = compare.figures(compared, rounds, agreed, {"task": "any", "batch": 2}, {"artifact": "any"})
    found = {(row["variant"], row["metric"]): row for row in rows}
    assert found["lookup", "ratio_to_stock"]["p50"] == 2.0
    assert found["lookup", "ratio_to_own_dense"]["p50"] == 4.0
    assert found["lookup", "accepted_per_step"]["p50"] == 2.0
    assert found["lookup", "agreed_tokens"]["p20"] == pytest.approx(2.4)  # of 4 and 2
    assert ("dense", "ratio_to_own_dense") not in found
    assert all(row["lossless"] and row["n"] == 2 and "artifact" not in row for row in rows)


def test_a_wrong_answer_gives_no_figure() -> None:
    """Fails if what a peer computes does not have to be right for it to be timed."""
    compared = [peer("stock", "stock"), peer("other", "stock")]
    with pytest.raises(Refused, match="'other' is wrong"):
        run(compared, lenient=Lenient(wrong=["other"]))


def test_what_nothing_was_compared_with_gives_no_figure() -> None:
    """Fails if a peer is timed that can be checked neither by its layers nor by its distributions."""
    lenient = Lenient()
    routed = SimpleNamespace(name="buddy", budget=0.5)
    compared = [peer("stock", "stock"), peer("buddy", "stock", run=None, variant=routed)]
    rounds, _ = run(compared, lenient=lenient)
    assert lenient.seen == ["stock"]
    assert rounds.values("tokens_per_s", "buddy").tolist() == [3.0, 3.0]
    unchecked, _ = run([peer("stock", "stock"), peer("loop", "stock", run=None)])
    with pytest.raises(Refused, match="was not checked"):
        unchecked.values("tokens_per_s", "loop")


def test_fewer_layers_are_judged_in_float32() -> None:
    """Fails if a pruned loop is refused for bf16's rounding, or not judged at all."""
    cut = LayersRun(frozenset({3}))
    judged: list[tuple[list[list[int]], float]] = []
    greedy = SimpleNamespace(check=lambda name, prompts, tokens, run, gap: judged.append((tokens, gap)))
    exact = answering([[9] * compare.FLOAT32_TOKENS] * 2)
    compared = [peer("pruned", "pruned", run=cut, ask_float32=exact), peer("dense", "dense", ask_float32=exact)]
    rounds = Rounds(1)
    compare.check(SimpleNamespace(check=lambda *_: None), greedy, compared, PROMPTS, 4, rounds)
    in_float32 = ([[9] * compare.FLOAT32_TOKENS] * 2, compare.FLOAT32_GAP)
    assert judged == [in_float32, ([[7] * 4, [8] * 4], compare.BFLOAT16_GAP), in_float32]
    assert rounds._checked == {"pruned", "dense"}


@pytest.mark.parametrize("token_ids", [[[7] * 4, [8] * 3], [[7] * 4], [[7] * 5, [8] * 5]])
def test_an_answer_of_another_length_is_refused(token_ids: list[list[int]]) -> None:
    """Fails if a loop that stops early, or drops a prompt, looks fast."""
    with pytest.raises(Refused, match="where 2 times 4 were asked for"):
        run([peer("stock", "stock", ask=answering(token_ids))])


def test_every_round_begins_with_another_peer() -> None:
    """Fails if one peer always runs right after the same other one."""
    order: list[str] = []

    def ask(name: str) -> Any:
        def answer(prompts: list[list[int]], tokens: int) -> Answer:
            order.append(name)
            return Answer([[7] * 4, [8] * 4], 1.0, [3, 3])

        return answer

    compared = [peer(name, "a", ask=ask(name)) for name in "abc"]
    compare.time_rounds(compared, [PROMPTS] * 3, 4, Rounds(3))
    assert "".join(order) == "abcbcacab"


def test_lossless_is_what_runs_all_layers() -> None:
    """Fails if skipped layers pass for the whole model's output."""
    assert peer("stock", "stock").lossless
    assert not peer("pruned", "stock", run=LayersRun(frozenset({3}))).lossless
    assert peer("buddy", "stock", run=None, variant=SimpleNamespace(budget=1.0)).lossless
    assert not peer("buddy", "stock", run=None, variant=SimpleNamespace(budget=0.5)).lossless


def test_an_engine_is_timed_from_the_step_that_brought_all_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a figure includes prefill, or a batch whose prompts took several steps has a figure."""
    run = SimpleNamespace(
        token_ids=[[1, 2, 3]] * 2, all_ms=[900.0, 10.0, 30.0], token_steps=[[0, 1, 2], [0, 2]], step_ms=[]
    )
    monkeypatch.setattr(engines, "decode", lambda *_: run)
    ask = peer_lineup._ask_engine(SimpleNamespace(name="stock"))  # type: ignore[arg-type]
    answer = ask(PROMPTS, 3)
    assert answer.seconds == pytest.approx(0.04)
    assert answer.passes == [2, 1]
    run.token_steps = [[0, 1, 2], [1, 2]]
    with pytest.raises(Refused, match="did not fit one step"):
        ask(PROMPTS, 3)


def test_a_loop_that_runs_other_layers_than_asked_is_refused() -> None:
    """Fails if a peer of another depth is compared as one of the same."""

    def ask(do: str, **request: Any) -> dict[str, Any]:
        return {"skipped": list(range(30 - request["layers"] - (request["loop"] == "skipdecode"))), "in_prompt": True}

    with pytest.raises(Refused, match="skipdecode leaves out"):
        peer_lineup.loop_peers(SimpleNamespace(ask=ask), 30, [[1]])  # type: ignore[arg-type]


def test_loops_are_asked_for_both_depths() -> None:
    """Fails if a technique, or a depth that buddy is timed at, is lost from the comparison."""
    asked = []

    def ask(do: str, **request: Any) -> dict[str, Any]:
        asked.append((do, request["loop"], request["layers"]))
        return {"skipped": list(range(30 - request["layers"])), "in_prompt": request["loop"] != "skipdecode"}

    found = {p.name: p for p in peer_lineup.loop_peers(SimpleNamespace(ask=ask), 30, [[1]])}  # type: ignore[arg-type]
    assert {name: p.layers for name, p in found.items() if p.layers < 30} == {
        "economize depth_prune 22": 22, "economize depth_prune 15": 15,
        "economize skipdecode 22": 22, "economize skipdecode 15": 15,
    }  # fmt: skip
    assert [name for name, p in found.items() if p.drafts] == ["economize lookup", "economize layer_skip"]
    assert found["economize skipdecode 15"].run == LayersRun(frozenset(range(15)), in_prompt=False)
    assert found["transformers generate"].dense == "transformers generate"
    assert {p.dense for p in found.values() if p.framework == "economize"} == {"economize dense"}


def test_calibration_rows_have_one_length() -> None:
    """Fails if the rows cannot be made a tensor."""
    rows = compare.calibration_rows(lambda text: SimpleNamespace(input_ids=list(range(len(text)))))
    assert np.array(rows).shape == (compare.CALIBRATION_ROWS, compare.CALIBRATION_TOKENS)
