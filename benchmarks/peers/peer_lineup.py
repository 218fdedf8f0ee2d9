"""Gives all systems that compare.py compares one interface: vLLM's engines and the loops of economize's process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from benchmarks.harness.lineup import Lineup
from benchmarks.harness.rounds import Refused
from benchmarks.peers.economize_process import LoopProcess
from benchmarks.peers.greedy_check import LayersRun
from vllm_buddy.method import depth_for_budget

BUDGETS = (0.75, 0.5)
# economize's lookup gets as many drafts, found by the same rule.
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@dataclass(frozen=True)
class Answer:
    """The answer to a batch of prompts.

    seconds: since all prompts had their first token. passes: passes of the whole model since then, for each prompt.
    """

    token_ids: list[list[int]]
    seconds: float
    passes: list[int]

    @property
    def num_decoded(self) -> int:
        """Number of tokens generated in `seconds`."""
        return sum(len(tokens) - 1 for tokens in self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        return self.num_decoded / self.seconds

    @property
    def accepted_per_step(self) -> float:
        """Tokens beyond one that a pass gained."""
        return self.num_decoded / sum(self.passes) - 1


Ask = Callable[[Sequence[list[int]], int], Answer]


@dataclass(kw_only=True)
class Peer:
    """One system to measure.

    ask: (prompts, tokens each) -> the answer. layers: number that a decoded token runs. dense: name of the peer that is
    the plain loop of the same framework. drafts: it speculates, losslessly.

    The check uses what is set of these: run, the layers that it says it ran; ask_float32, the same loop in float32;
    variant, whose distributions vLLM returns.
    """

    name: str
    framework: str
    ask: Ask
    layers: int
    dense: str
    drafts: bool = False
    run: LayersRun | None = None
    ask_float32: Ask | None = None
    variant: Variant | None = None

    @property
    def lossless(self) -> bool:
        """Whether it generates the tokens of the whole model."""
        return self.run == LayersRun() or (self.variant is not None and self.variant.budget == 1.0)


def vllm_peers(lineup: Lineup) -> list[Peer]:
    """Return vLLM's variants, stock first."""
    peers = [_vllm_peer(lineup, variant) for variant in [lineup.stock(), *map(lineup.pruned, BUDGETS)]]
    own_paths = lineup.artifact.decision is not None
    note = "own paths" if own_paths else ""
    for budget in (1.0, *BUDGETS):
        variant = lineup.routed(budget, own_paths=own_paths, schedule=lineup.artifact.schedule(), note=note)
        peers.append(_vllm_peer(lineup, variant))
    # This engine starts last: it imports numba, after which vLLM 0.32 starts no other engine in this process (its
    # search for kernels in all modules fails on the module that wraps LLVM).
    engine = engines.start_engine(str(lineup.model), speculative_config=NGRAM)
    peers.append(
        Peer(
            name="stock, n-gram", framework="vLLM", layers=lineup.num_layers, dense="stock", drafts=True,
            ask=_ask_engine(Variant(name="stock, n-gram", layers=lineup.num_layers, llm=engine)), run=LayersRun(),
        )
    )  # fmt: skip
    return peers


def loop_peers(process: LoopProcess, num_layers: int, calibration: list[list[int]]) -> list[Peer]:
    """Return the loops of transformers and economize. calibration: token ids by which economize chooses layers."""
    shallow = [depth_for_budget(budget, num_layers) for budget in BUDGETS]
    asked = [("transformers", num_layers), ("dense", num_layers), ("lookup", num_layers), ("layer_skip", num_layers)]
    asked += [(loop, layers) for loop in ("depth_prune", "skipdecode") for layers in shallow]
    peers = []
    for loop, layers in asked:
        made = process.ask("prepare", loop=loop, layers=layers, calibration=calibration)
        run = LayersRun(frozenset(made["skipped"]), made["in_prompt"])
        if num_layers - len(run.skipped) != layers:
            raise Refused(f"economize's {loop} leaves out {sorted(run.skipped)}: these are not {layers} layers")
        framework = "transformers" if loop == "transformers" else "economize"
        name = "transformers generate" if loop == "transformers" else f"economize {loop}"
        peers.append(
            Peer(
                name=name if layers == num_layers else f"{name} {layers}",
                framework=framework,
                ask=_ask_loop(process, loop, layers, "bfloat16"),
                layers=layers,
                dense="transformers generate" if loop == "transformers" else "economize dense",
                drafts=loop in ("lookup", "layer_skip"),
                run=run,
                ask_float32=_ask_loop(process, loop, layers, "float32"),
            )
        )
    return peers


def _vllm_peer(lineup: Lineup, variant: Variant) -> Peer:
    return Peer(
        name=variant.name,
        framework="vLLM",
        ask=_ask_engine(variant),
        layers=variant.layers,
        dense="stock",
        run=LayersRun() if variant.path is not None and variant.layers == lineup.num_layers else None,
        variant=variant,
    )


def _ask_engine(variant: Variant) -> Ask:
    def ask(prompts: Sequence[list[int]], tokens: int) -> Answer:
        run = engines.decode(variant, prompts, tokens)
        if any(steps[0] != 0 for steps in run.token_steps):
            raise Refused(
                f"'{variant.name}': the prompts of a batch did not fit one step, so its decoding has no start"
            )
        return Answer(run.token_ids, sum(run.all_ms[1:]) / 1e3, [len(steps) - 1 for steps in run.token_steps])

    return ask


def _ask_loop(process: LoopProcess, loop: str, layers: int, dtype: str) -> Ask:
    def ask(prompts: Sequence[list[int]], tokens: int) -> Answer:
        asked: dict[str, Any] = {"layers": layers, "dtype": dtype, "prompts": list(prompts), "tokens": tokens}
        return Answer(**process.ask("generate", loop=loop, **asked))

    return ask
