"""Scores samples with the plugin in vLLM, as prompt log-probabilities; a prompt's path is decided from its context.

This measures the code that serves requests. One engine is started for each policy, one after another.
"""

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

from vllm_buddy.evaluation.engine import Report, Scores, Task, Variant
from vllm_buddy.evaluation.policy import Policy
from vllm_buddy.evaluation.sample import Sample
from vllm_buddy.models.kv_size import kv_bytes
from vllm_buddy.serving.admission.option_names import BUDGET_KEY, CONTEXT_TOKENS_KEY
from vllm_buddy.serving.start.settings import CONFIG_KEY

_MAX_SEQUENCES = 32  # sequences that run at the same time
_SHUTDOWN_S = 30  # an engine that takes longer to shut down is killed


class VllmEngine:
    """An engine over vLLM. It measures no KL, because vLLM returns log-probabilities of a few tokens only."""

    def __init__(self, model_dir: Path, kv_policy: str, dtype: str) -> None:
        self._model_dir = model_dir
        self._kv_policy = kv_policy
        self._dtype = dtype

    def score(self, tasks: Sequence[Task], variants: Sequence[Variant], report: Report) -> list[list[Scores]]:
        """See Engine.score."""
        found: list[list[Scores]] = [[] for _ in tasks]
        length = max(len(sample.token_ids) for task in tasks for sample in task.samples)
        # The variants of a policy are neighbours in the list, so each policy is started once.
        for _, group in itertools.groupby(variants, key=lambda variant: id(variant.policy)):
            own = list(group)
            with self._serve(own[0].policy, length) as llm:
                for task, scores in zip(tasks, found):
                    for done, variant in enumerate(own, start=1):
                        scores.append(_score(llm, task.samples, variant.budget))
                        report(f"{task.name}, {variant.policy.name}", done, len(own))
        return found

    @contextmanager
    def _serve(self, policy: Policy, max_tokens: int) -> Iterator[LLM]:
        with tempfile.TemporaryDirectory(prefix="vllm_buddy_eval_") as folder:
            policy.artifact.save(Path(folder))
            settings = {
                "artifact": folder,
                "kv_policy": self._kv_policy,
                "paths": None if policy.library is None else "library" if policy.library else "free",
                "route_every": policy.schedule.interval,
            }
            llm = LLM(
                str(self._model_dir),
                model_impl="buddy",
                additional_config={CONFIG_KEY: settings},
                dtype=self._dtype,
                skip_tokenizer_init=True,
                enforce_eager=True,
                async_scheduling=False,  # so that a decision sees the newest token, as in the Hugging Face engine
                max_model_len=max_tokens + 1,
                max_num_seqs=_MAX_SEQUENCES,
                kv_cache_memory_bytes=kv_bytes(self._model_dir, _MAX_SEQUENCES, max_tokens + 1, self._dtype),
                seed=0,
            )
            try:
                yield llm
            finally:
                llm.llm_engine.engine_core.shutdown(timeout=_SHUTDOWN_S)


def _score(llm: LLM, samples: Sequence[Sample], budget: float) -> Scores:
    outputs = llm.generate(
        [{"prompt_token_ids": list(sample.token_ids)} for sample in samples],
        [
            SamplingParams(
                temperature=0.0,
                max_tokens=1,
                prompt_logprobs=1,
                detokenize=False,
                extra_args={BUDGET_KEY: budget, CONTEXT_TOKENS_KEY: sample.num_context},
            )
            for sample in samples
        ],
        use_tqdm=False,
    )
    logprobs, greedy = [], []
    for sample, output in zip(samples, outputs, strict=True):
        positions: Sequence[Mapping[int, Any]] = output.prompt_logprobs[sample.num_context :]
        logprobs.append(
            np.array([found[token].logprob for found, token in zip(positions, sample.targets, strict=True)])
        )
        greedy.append(np.array([min(found, key=lambda token: found[token].rank) for found in positions]))
    return Scores(logprobs, greedy)
