"""The policies that an evaluation compares. Each is an artifact and a way to use it, so all engines can run it.

| name | what it is |
|---|---|
| `dense` | the unrouted model |
| `buddy` | the artifact that is evaluated |
| `shortgpt`, `sleb`, ... | a static method's layer sets on the base model, without repair |
| `NAME=DIR` | the artifact in folder DIR under the name NAME |

`:frozen` after the name of an artifact (`buddy:frozen`, `NAME:frozen=DIR`) gives every token the router's most common
path at its depth; `:prompt_only` switches re-routing off. `:token` chooses the path of each token (schedule `token`),
so that a budget is a mean; `:shuffled` deals the same paths to the tokens of each sample at random. `:full_prompt` runs
the context at full depth, as `buddy_prompt: "full"` does with a prompt in serving.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from vllm_buddy.artifact import Artifact
from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.baselines import STATIC_METHODS, bare_artifact, static_artifact, with_fixed_paths
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.sample import Sample
from vllm_buddy.method import (
    LayerPath,
    PathSchedule,
    RequestRoute,
    Route,
    Router,
    Run,
    SplitRoute,
    TokenRoute,
    TokenSchedule,
)

DENSE = "dense"
BUDDY = "buddy"
FROZEN = "frozen"
PROMPT_ONLY = "prompt_only"
TOKEN = "token"
SHUFFLED = "shuffled"
FULL_PROMPT = "full_prompt"
VARIANTS = (FROZEN, PROMPT_ONLY, TOKEN, SHUFFLED, FULL_PROMPT)


@dataclass(frozen=True)
class PolicySpec:
    """A policy as the user names it. folder: DIR of NAME=DIR. variant: the part after the colon."""

    name: str
    base_name: str
    variant: str | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        return self.name if self.folder is None else f"{self.name}={self.folder}"

    @property
    def is_static(self) -> bool:
        return self.folder is None and self.base_name in STATIC_METHODS

    @classmethod
    def parse(cls, text: str) -> "PolicySpec":
        """Read `dense`, `buddy[:VARIANT]`, the name of a static method or `NAME[:VARIANT]=DIR`.

        Raises:
            EvaluationError: the text is none of these; the message lists the known names.
        """
        name, has_folder, folder = text.partition("=")
        base_name, has_variant, variant = name.partition(":")
        if has_variant and variant not in VARIANTS:
            raise EvaluationError(f"policy '{text}': unknown variant '{variant}'; known are {', '.join(VARIANTS)}")
        reserved = (DENSE, BUDDY, *STATIC_METHODS)
        if has_folder:
            if not base_name or base_name in reserved or not folder:
                raise EvaluationError(
                    f"policy '{text}': an artifact needs a folder and a name that is not one of {', '.join(reserved)}"
                )
            return cls(name, base_name, variant or None, Path(folder))
        if base_name not in reserved:
            raise EvaluationError(
                f"unknown policy '{text}'; known are {', '.join(reserved)}, and NAME=DIR for another artifact"
            )
        if variant and base_name != BUDDY:
            raise EvaluationError(f"policy '{text}': '{base_name}' has no router, so no variant '{variant}'")
        return cls(name, base_name, variant or None)


@dataclass(frozen=True)
class Policy:
    """An artifact and the way its router is used."""

    name: str
    artifact: Artifact
    schedule: PathSchedule
    library: bool | None = None  # see Artifact.router
    tokens: TokenSchedule | None = None  # of schedule `token`; None: each request has one depth
    shuffled: bool = False  # whether the paths of a sample's tokens are dealt at random
    full_prompt: bool = False  # whether the context runs all layers

    @cached_property
    def router(self) -> Router:
        return self.artifact.router(library=self.library)

    def route(self, sample: Sample, depth: int) -> list[Run]:
        """Return the runs of the sample's inputs. Decisions see the context, and later tokens as they are run.

        depth: of every token, or on average over the tokens under schedule `token`.
        """
        if self.tokens is not None:
            return self._token_runs(sample, depth, self.tokens)
        route: Route = self._route_of_depth(depth, sample)
        if self.full_prompt:
            route = SplitRoute(self._route_of_depth(self.router.num_layers, sample), route, sample.num_context)
        return route.runs(0, len(sample.inputs), sample.inputs)

    def _route_of_depth(self, depth: int, sample: Sample) -> RequestRoute:
        return RequestRoute(self.router, self.schedule, depth, sample.inputs, sample.num_context)

    def _token_runs(self, sample: Sample, depth: int, schedule: TokenSchedule) -> list[Run]:
        assert self.artifact.token is not None  # checked where the policy is made
        route = TokenRoute(self.artifact.token, schedule, depth / self.router.num_layers, sample.inputs)
        runs = route.runs(0, len(sample.inputs), sample.inputs)
        if not self.shuffled:
            return runs
        paths = [run.path for run in runs for _ in range(run.num_tokens)]
        seed = zlib.crc32(np.array(sample.inputs, dtype=np.int64).tobytes())
        return [Run(1, paths[i]) for i in np.random.default_rng(seed).permutation(len(paths))]

    def path_counts(self, samples: Sequence[Sample], depth: int) -> Counter[LayerPath]:
        """Return the number of tokens that run each path."""
        counts: Counter[LayerPath] = Counter()
        for sample in samples:
            for run in self.route(sample, depth):
                counts[run.path] += run.num_tokens
        return counts

    def frozen(self, samples: Sequence[Sample], depths: Sequence[int]) -> "Policy":
        """Return this policy with one path per depth, the one that most tokens of `samples` run.

        At full depth alone there is one path anyway.
        """
        if all(depth == self.router.num_layers for depth in depths):
            return self
        paths = {depth: self.path_counts(samples, depth).most_common(1)[0][0] for depth in depths}
        return replace(self, artifact=with_fixed_paths(self.artifact, paths), library=True)


def static_policy(name: str, base: BaseModelIdentity, order: Sequence[int]) -> Policy:
    """Return a policy that removes layers of the base model in `order`, without repair (see vllm_buddy.baselines)."""
    artifact = static_artifact(name, base, order)
    return Policy(name, artifact, artifact.schedule(), library=True)


def dense_policy(base: BaseModelIdentity) -> Policy:
    """Return the policy of the unrouted base model, which is run at full depth."""
    return Policy(DENSE, bare_artifact(DENSE, base), PathSchedule(0))
