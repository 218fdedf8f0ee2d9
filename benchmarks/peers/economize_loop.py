"""Serves economize and transformers from a separate process: it reads a line of JSON and answers with one.

    python -m benchmarks.peers.economize_loop MODEL --threads 2        # started by economize_process.py

economize registers a vLLM plugin, so only this process may have it on its path. Requests:

    {"do": "prepare", "loop": "depth_prune", "layers": 22, "calibration": [[...], ...]}
    {"do": "generate", "loop": "depth_prune", "layers": 22, "prompts": [[...], ...], "tokens": 64}

The reply is the return value of the method of Loops with that name, or {"error": ...}.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import nn

LOOKUP_CYCLE = 6  # tokens of a pass: the next token and 5 drafts
LAYER_SKIP_CYCLE = 2
LAYER_SKIP_KEPT = 0.75  # share of the layers that draft


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.economize_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of libraries must not mix with the replies
    torch.set_num_threads(args.threads)
    loops = Loops(args.model)
    serve(sys.stdin, replies, {"about": loops.about, "prepare": loops.prepare, "generate": loops.generate})


def serve(requests: Iterable[str], replies: TextIO, methods: dict[str, Callable[..., Any]]) -> None:
    """Answer until there are no more requests. Between requests the process waits for a line."""
    for line in requests:
        try:
            request = json.loads(line)
            reply = methods[request.pop("do")](**request)
        except Exception as error:  # the other side decides what to do about an error
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class FirstTokens:
    """The time at which the first tokens of all prompts were known."""

    def __init__(self) -> None:
        self.at: float | None = None

    def tick(self) -> None:
        """Record the time. Call it wherever tokens are about to be chosen."""
        if self.at is None:
            self.at = time.perf_counter()


# (prompts, tokens, first) -> for each prompt, the tokens and the passes of the whole model after the first token.
Generate = Callable[[list[torch.Tensor], int, FirstTokens], tuple[list[list[int]], list[int]]]


@dataclass
class Loop:
    """A model and a way to generate. skipped: layers left out, from 0. in_prompt: prompt tokens leave them out too."""

    model: Any
    generate: Generate
    skipped: Sequence[int] = ()
    in_prompt: bool = True


class Loops:
    """A loop per technique and depth. Techniques that do not change the weights share a model."""

    def __init__(self, model_dir: str) -> None:
        self._model_dir = model_dir
        self._base = self._load()
        self._prepared: dict[tuple[str, int], Loop] = {}

    def about(self) -> dict[str, Any]:
        """Return versions, and the threads and cores that this process may use."""
        import economize  # type: ignore[import-not-found]
        import transformers

        return {
            "versions": {"economize": economize.__version__, "transformers": transformers.__version__},
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
        }

    def prepare(self, loop: str, layers: int, calibration: list[list[int]]) -> dict[str, Any]:
        """Make a loop. layers: number that a decoded token runs. calibration: rows of token ids, all of one length.

        Returns:
            Loop.skipped and Loop.in_prompt.
        """
        makers = {
            "transformers": self._transformers,
            "dense": self._dense,
            "lookup": self._lookup,
            "layer_skip": self._layer_skip,
            "depth_prune": self._depth_prune,
            "skipdecode": self._skipdecode,
        }
        made = makers[loop](self._base.config.num_hidden_layers - layers, torch.tensor(calibration))
        self._prepared[loop, layers] = made
        return {"skipped": list(made.skipped), "in_prompt": made.in_prompt}

    def generate(
        self, loop: str, layers: int, prompts: list[list[int]], tokens: int, dtype: str = "bfloat16"
    ) -> dict[str, Any]:
        """Decode all prompts greedily at once, `tokens` each, without stopping at an end token. dtype: to compute in.

        Returns:
            token_ids and passes: see Generate. seconds: from the time at which all first tokens were known to the end.
        """
        made = self._prepared[loop, layers]
        first = FirstTokens()
        with computing_in(made.model, getattr(torch, dtype)):
            token_ids, passes = made.generate([torch.tensor(p) for p in prompts], tokens, first)
            ended = time.perf_counter()
        assert first.at is not None
        return {"token_ids": token_ids, "passes": passes, "seconds": ended - first.at}

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._model_dir, dtype=torch.bfloat16, local_files_only=True)
        return model.eval()

    def _transformers(self, num_skipped: int, calibration: torch.Tensor) -> Loop:
        return Loop(self._base, _transformers_generate(self._base))

    def _dense(self, num_skipped: int, calibration: torch.Tensor) -> Loop:
        return _economize_loop(_attach(self._base))

    def _lookup(self, num_skipped: int, calibration: torch.Tensor) -> Loop:
        from economize.techniques.lookup import LookupConfig  # type: ignore[import-not-found]

        return _economize_loop(_attach(self._base, LookupConfig(), cycle_length=LOOKUP_CYCLE))

    def _layer_skip(self, num_skipped: int, calibration: torch.Tensor) -> Loop:
        from economize.techniques.layer_skip import LayerSkipConfig  # type: ignore[import-not-found]

        num_layers = self._base.config.num_hidden_layers
        config = LayerSkipConfig(num_skip=num_layers - int(LAYER_SKIP_KEPT * num_layers))
        return _economize_loop(_attach(self._base, config, cycle_length=LAYER_SKIP_CYCLE, calibration=calibration))

    def _depth_prune(self, num_skipped: int, calibration: torch.Tensor) -> Loop:
        from economize.techniques.prune import DepthPruneConfig  # type: ignore[import-not-found]

        config = DepthPruneConfig(method="shortgpt", num_blocks=num_skipped)
        model = _attach(self._load(), config, calibration=calibration)
        removed = model.techniques["depth_prune"].config.layers  # from 1
        return _economize_loop(model, skipped=[layer - 1 for layer in removed])

    def _skipdecode(self, num_skipped: int, calibration: torch.Tensor) -> Loop:
        from economize.techniques.dynamic_depth import SkipDecodeConfig  # type: ignore[import-not-found]

        layers = self._base.config.num_hidden_layers - num_skipped
        model = _attach(self._base, SkipDecodeConfig(max_layers=layers, min_layers=layers))
        return _economize_loop(model, skipped=range(num_skipped), in_prompt=False)


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold a bf16 model's parameters in `dtype` while the block runs. bf16 to float32 and back changes no value."""
    if dtype != torch.bfloat16:
        _cast(model, dtype)
    try:
        yield
    finally:
        if dtype != torch.bfloat16:
            _cast(model, torch.bfloat16)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():  # not the buffers: those of RoPE are always float32
        parameter.data = parameter.data.to(dtype)


def _attach(model: Any, *configs: Any, cycle_length: int = 1, calibration: torch.Tensor | None = None) -> Any:
    import economize

    decoding = economize.DecodeConfig(cycle_length=cycle_length)
    return economize.apply(model, *configs, decoding=decoding, calibration=calibration)


def _economize_loop(model: Any, skipped: Sequence[int] = (), in_prompt: bool = True) -> Loop:
    import economize

    class Selector(economize.GreedySelector):
        def __init__(self, first: FirstTokens) -> None:
            self._first = first

        def select_many(self, logits: torch.Tensor) -> torch.Tensor:
            self._first.tick()
            return super().select_many(logits)

    def generate(prompts: list[torch.Tensor], tokens: int, first: FirstTokens) -> tuple[list[list[int]], list[int]]:
        results = model.decode_batch(prompts, tokens, selector=Selector(first))
        return [r.tokens.tolist() for r in results], [r.cost.count("exact") - 1 for r in results]

    return Loop(model, generate, skipped, in_prompt)


def _transformers_generate(model: Any) -> Generate:
    def generate(prompts: list[torch.Tensor], tokens: int, first: FirstTokens) -> tuple[list[list[int]], list[int]]:
        def tick(_token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            first.tick()
            return scores

        padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
        padding = torch.tensor([padded.shape[1] - len(prompt) for prompt in prompts])
        mask = (torch.arange(padded.shape[1]) >= padding[:, None]).long()
        out = model.generate(
            padded, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
            logits_processor=[tick],
        )  # fmt: skip
        return out[:, padded.shape[1] :].tolist(), [tokens - 1] * len(prompts)

    return generate


if __name__ == "__main__":
    main()
