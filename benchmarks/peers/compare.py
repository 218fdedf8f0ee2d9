"""Compares buddy with n-gram speculation, pruned checkpoints, transformers and economize on one model.

    python -m benchmarks.peers.compare            # SmolLM2-135M, CPU, about 15 minutes on 2 cores

vLLM runs in this process: stock; stock with n-gram speculation; stock on checkpoints pruned to 22 and 15 layers,
without repair; buddy with the artifact's own router and repair. The other systems run in a second process, which waits
while vLLM runs: transformers' generate, and economize 0.3.2 (PyPI), the closest comparable system in a Hugging Face
loop, with its techniques that make tokens cheaper without training. *dense* is its plain loop. *lookup* (drafts by
n-grams, with the settings of stock vLLM) and *layer_skip* (drafts by 22 of the layers) are lossless. *depth_prune*
removes layers by ShortGPT (SLEB removes others; the speed is the same). *skipdecode* runs decoded tokens through the
upper 22 or 15 layers. All use bf16 and the same number of threads. vLLM compiles, the others do not.

Prompts are about passages of prose: *proofread* is answered by copying, *story* is not. tokens/s are those of greedy
decoding, from the time at which all prompts of a batch have their first token until all have their last. Ratios are
taken within a round. accepted_per_step: tokens beyond one that a request gains from a pass of the whole model.
agreed_tokens: tokens of an answer with drafts before the first difference from the plain loop of the same framework.

Before anything is timed, the distributions of vLLM's variants are compared with the method's plain forward. Every
system that runs the whole model, n-gram speculation included, must generate its greedy choices up to bf16's rounding.
In float32 the loops of the second process must generate the greedy choices of the layers that they say they ran
(greedy_check.py). The results also list what each system can and cannot do (capabilities.py).
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.lineup import Lineup, add_lineup_options, open_lineup
from benchmarks.harness.real_prompts import TASKS, draw_prompts, passages
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, percentiles, report
from benchmarks.harness.rounds import Refused, Rounds, add_rounds_option, at_least, in_turn, positive_int
from benchmarks.peers import capabilities, economize_process
from benchmarks.peers.greedy_check import BFLOAT16_GAP, FLOAT32_GAP, GreedyCheck, LayersRun, num_agreed
from benchmarks.peers.peer_lineup import Answer, Ask, Peer, loop_peers, vllm_peers
from vllm_buddy.models.embedded import fetch

CALIBRATION_ROWS, CALIBRATION_TOKENS = 2, 64
FLOAT32_TOKENS = 24
ROUNDS, SHORT_ROUNDS = 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--short", action="store_true", help="batch 8, fewer rounds, 33 tokens")
    parser.add_argument("--batch", type=positive_int, nargs="+", help="default: 1 8")
    add_rounds_option(parser, ROUNDS, SHORT_ROUNDS)
    parser.add_argument("--tokens", type=at_least(2), help="of an answer; default: 64")
    parser.add_argument("--economize", type=Path, help="folder it is installed in; default: pip gets it")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_peers.jsonl")
    add_lineup_options(parser)
    args = parser.parse_args()
    if device() != "cpu":
        raise Refused("economize's process runs on the CPU, with which vLLM on another device is not compared")
    env = environment()
    batches = args.batch or ([8] if args.short else [1, 8])
    num_rounds = args.rounds or (SHORT_ROUNDS if args.short else ROUNDS)
    tokens = args.tokens or (33 if args.short else 64)
    args.model = args.model or fetch(report=print)
    with tempfile.TemporaryDirectory(prefix="vllm_buddy-peers-") as folder:
        work = Path(folder)
        site = args.economize or economize_process.install(work / "site")
        with economize_process.started(args.model, site, work, torch.get_num_threads()) as process:
            env["versions"].update(process.ask("about")["versions"])
            with open_lineup(args) as lineup:
                tokenizer = load_tokenizer(lineup.model)
                loops = loop_peers(process, lineup.num_layers, calibration_rows(tokenizer))
                rows = measure(lineup, [*vllm_peers(lineup), *loops], tokenizer, batches, num_rounds, tokens)
    report(args.out, [*rows, *capabilities.rows()], env)


def load_tokenizer(model: Path) -> Any:
    """Return the tokenizer with its chat format. The engines start without a tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def calibration_rows(tokenizer: Any) -> list[list[int]]:
    """Return the text by which economize chooses layers, which is of the same kind as the prompts."""
    token_ids = tokenizer(" ".join(passages())).input_ids
    starts = range(0, CALIBRATION_ROWS * CALIBRATION_TOKENS, CALIBRATION_TOKENS)
    return [list(token_ids[start : start + CALIBRATION_TOKENS]) for start in starts]


def measure(
    lineup: Lineup, peers: Sequence[Peer], tokenizer: Any, batches: Sequence[int], num_rounds: int, tokens: int
) -> list[dict[str, Any]]:
    """Check and time everything for each task and batch size, and return one row per figure."""
    greedy = GreedyCheck.load(lineup.model)
    texts = passages()
    rows = []
    for task in TASKS:
        for batch in batches:
            rng = np.random.default_rng(batch)
            draws = [draw_prompts(tokenizer, task, texts, rng, batch) for _ in range(num_rounds + 1)]
            rounds = Rounds(num_rounds)
            agreed = check(lineup, greedy, peers, draws[0], tokens, rounds)
            time_rounds(peers, draws[1:], tokens, rounds)
            rows += figures(peers, rounds, agreed, {"task": task, "batch": batch}, lineup.about())
    return rows


def check(
    lineup: Lineup, greedy: GreedyCheck, peers: Sequence[Peer], prompts: list[list[int]], tokens: int, rounds: Rounds
) -> dict[str, list[int]]:
    """Check the answers of all peers and mark the peers in `rounds`. This also warms them up.

    Returns:
        For each peer with drafts, the number of tokens that each of its answers has in common with the plain loop's.

    Raises:
        Refused: an answer is wrong.
    """
    answers = {peer.name: complete_answer(peer, peer.ask, prompts, tokens) for peer in peers}
    for peer in peers:
        if peer.run == LayersRun():
            greedy.check(peer.name, prompts, answers[peer.name].token_ids, peer.run, BFLOAT16_GAP)
            rounds.mark_checked([peer.name])
        if peer.run is not None and peer.ask_float32 is not None:
            exact = complete_answer(peer, peer.ask_float32, prompts, FLOAT32_TOKENS)
            greedy.check(peer.name, prompts, exact.token_ids, peer.run, FLOAT32_GAP)
            rounds.mark_checked([peer.name])
    lineup.check([peer.variant for peer in peers if peer.variant is not None], prompts, rounds)
    pairs = [(peer.name, answers[peer.name].token_ids, answers[peer.dense].token_ids) for peer in peers if peer.drafts]
    return {name: [num_agreed(a, b) for a, b in zip(ours, dense)] for name, ours, dense in pairs}


def time_rounds(peers: Sequence[Peer], draws: Sequence[list[list[int]]], tokens: int, rounds: Rounds) -> None:
    """Ask all peers once a round. Each round begins with a different peer."""
    for index, prompts in enumerate(draws):
        for peer in in_turn(peers, index):
            answer = complete_answer(peer, peer.ask, prompts, tokens)
            rounds.add(index, peer.name, tokens_per_s=answer.tokens_per_s)
            if peer.drafts:
                rounds.add(index, peer.name, accepted_per_step=answer.accepted_per_step)


def complete_answer(peer: Peer, ask: Ask, prompts: list[list[int]], tokens: int) -> Answer:
    """Return the answer. Raises Refused if it has not `tokens` tokens for each prompt."""
    answer = ask(prompts, tokens)
    lengths = [len(token_ids) for token_ids in answer.token_ids]
    if lengths != [tokens] * len(prompts):
        raise Refused(f"'{peer.name}' gave {lengths} tokens where {len(prompts)} times {tokens} were asked for")
    return answer


def figures(
    peers: Sequence[Peer], rounds: Rounds, agreed: dict[str, list[int]], setting: dict[str, Any], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the rows of one setting. about: columns that describe buddy's artifact."""
    rows = []
    for peer in peers:
        routed = peer.variant is not None and peer.variant.budget is not None
        row = {
            "variant": peer.name,
            "framework": peer.framework,
            **setting,
            "layers": peer.layers,
            "lossless": peer.lossless,
            **(about if routed else {}),
        }
        found = {
            "tokens_per_s": rounds.values("tokens_per_s", peer.name),
            "ratio_to_stock": rounds.ratio("tokens_per_s", peer.name, "stock"),
        }
        if peer.dense not in ("stock", peer.name):
            found["ratio_to_own_dense"] = rounds.ratio("tokens_per_s", peer.name, peer.dense)
        if peer.drafts:
            found["accepted_per_step"] = rounds.values("accepted_per_step", peer.name)
        rows += [rounds.row(metric, values, **row) for metric, values in found.items()]
        if peer.drafts:
            common = agreed[peer.name]
            rows.append({"metric": "agreed_tokens", **row, **percentiles(common), "n": len(common)})
    return rows


if __name__ == "__main__":
    main()
