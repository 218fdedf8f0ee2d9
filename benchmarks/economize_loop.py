"""economize and transformers in a process of their own: a line of JSON in, a line of JSON out.

    python benchmarks/economize_loop.py MODEL --threads 2        # started by economize_process.py

economize registers a vLLM plugin, so that only this process may have it on its path. Requests:

    {"do": "prepare", "loop": "depth_prune", "layers": 22, "calibration": [[...], ...]}
    {"do": "generate", "loop": "depth_prune", "layers": 22, "prompts": [[...], ...], "tokens": 64}

The reply is what the method of Loops of that name returns, or {"error": ...}.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import nn

LOOKUP_CYCLE = 6  # tokens of a pass: one and 5 drafts, as many as stock vLLM with n-grams is given here
LAYER_SKIP_CYCLE = 2  # the best of 2 and 4 on SmolLM2-135M


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    torch.set_num_threads(args.threads)
    loops = Loops(args.model)
    serve(sys.stdin, replies, {"about": loops.about, "prepare": loops.prepare, "generate": loops.generate})


def serve(requests: Iterable[str], replies: TextIO, methods: dict[str, Callable[..., Any]]) -> None:
    """Answer until there are no more requests; between them the process waits for a line."""
    for line in requests:
        try:
            request = json.loads(line)
            reply = methods[request.pop("do")](**request)
        except Exception as error:  # whatever went wrong is the reply, and for the other side to judge
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


@dataclass
class Loop:
    """A way to generate. generate: (prompts, tokens, clock) to tokens and passes per prompt, see Loops.generate.

    skipped: layers, from 0, that are left out; in_prompt: by the prompt's tokens too, or only by decoded ones.
    """

    generate: Callable[[list[torch.Tensor], int, "FirstToken"], tuple[list[list[int]], list[int]]]
    skipped: Sequence[int] = ()
    in_prompt: bool = True


class FirstToken:
    """When the first tokens of all prompts were known. Loops call it where they choose tokens."""

    def __init__(self) -> None:
        self.at: float | None = None

    def tick(self) -> None:
        if self.at is None:
            self.at = time.perf_counter()


class Loops:
    """One loop per technique and depth, each made when it is asked for; they share a model where they leave it alone."""

    def __init__(self, model_dir: str) -> None:
        self._model_dir = model_dir
        self._base = self._load()
        self._prepared: dict[tuple[str, int], Loop] = {}

    def about(self) -> dict[str, Any]:
        """Versions, and what this process may use of the machine."""
        import economize  # type: ignore[import-not-found]
        import transformers

        return {
            "versions": {"economize": economize.__version__, "transformers": transformers.__version__},
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
        }

    def prepare(self, loop: str, layers: int, calibration: list[list[int]]) -> dict[str, Any]:
        """Make a loop. layers: of a decoded token. calibration: rows of token ids, of one length.

        Returns:
            Loop.skipped and Loop.in_prompt.
        """
        build = {
            "transformers": self._transformers,
            "dense": self._dense,
            "lookup": self._lookup,
            "layer_skip": self._layer_skip,
            "depth_prune": self._depth_prune,
            "skipdecode": self._skipdecode,
        }[loop]
        made = self._prepared[loop, layers] = build(layers, torch.tensor(calibration))
        return {"skipped": list(made.skipped), "in_prompt": made.in_prompt}

    def generate(self, loop: str, layers: int, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Greedy decoding of all prompts at once, without an end.

        Returns:
            token_ids and, behind the first token, passes of the whole model: per prompt. seconds: from when all first
            tokens were known to when all tokens were.
        """
        first = FirstToken()
        token_ids, passes = self._prepared[loop, layers].generate([torch.tensor(p) for p in prompts], tokens, first)
        assert first.at is not None
        return {"token_ids": token_ids, "passes": passes, "seconds": time.perf_counter() - first.at}

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            self._model_dir, dtype=torch.bfloat16, local_files_only=True
        ).eval()

    def _transformers(self, layers: int, calibration: torch.Tensor) -> Loop:
        def generate(
            prompts: list[torch.Tensor], tokens: int, first: FirstToken
        ) -> tuple[list[list[int]], list[int]]:
            def tick(token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                first.tick()
                return scores

            padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
            lengths = torch.tensor([len(p) for p in prompts])
            mask = torch.arange(padded.shape[1]) >= padded.shape[1] - lengths[:, None]
            out = self._base.generate(
                padded, attention_mask=mask.long(), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
                pad_token_id=0, logits_processor=[tick],
            )  # fmt: skip
            return out[:, padded.shape[1] :].tolist(), [tokens - 1] * len(prompts)

        return Loop(generate)

    def _dense(self, layers: int, calibration: torch.Tensor) -> Loop:
        return self._economize(self._base, cycle_length=1)

    def _lookup(self, layers: int, calibration: torch.Tensor) -> Loop:
        from economize.techniques.lookup import LookupConfig  # type: ignore[import-not-found]

        return self._economize(self._base, LookupConfig(), cycle_length=LOOKUP_CYCLE)

    def _layer_skip(self, layers: int, calibration: torch.Tensor) -> Loop:
        from economize.techniques.layer_skip import LayerSkipConfig  # type: ignore[import-not-found]

        ...
