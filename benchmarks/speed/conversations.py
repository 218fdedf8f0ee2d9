"""Measures conversations at mixed budgets: what the prefix cache holds of their prompts, by prompt mode and KV layout.

    python -m benchmarks.speed.conversations            # SmolLM2-135M, CPU, about 15 minutes on 2 cores

16 users share a system prompt of 1,000 tokens, and have three turns each. A turn's prompt is the conversation so far,
with the answers that this variant gave, and a question of 64 tokens; the answer has 48. A turn is sent when the last
one is answered; the first turns arrive 4 engine steps apart. A user keeps one budget: 1.0, 0.875, 0.75 or 0.5, a
quarter of the users each.

Engines: stock vLLM, at full depth, and buddy with the dense KV layout, with units, and with KV policy `kv_only`, each
with prompts that are routed and with prompts at full depth. Every budget of each is checked against the plain forward
first. The prefix cache is emptied before each run.

Figures of a run: `hit_rate`, the share of prompt tokens that were found in the prefix cache; `ttft_ms`, the time from
the arrival of a request to its first token, mean over the requests; `tokens_per_s`, decoded tokens over the whole run.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from benchmarks.harness.real_prompts import passages
from benchmarks.harness.reference_check import Reference
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Refused, Rounds, add_rounds_option, in_turn
from vllm_buddy.artifact import SHIPPED_DIR, Artifact, load_artifact
from vllm_buddy.method import depth_for_budget, full_path
from vllm_buddy.method.kv_policy import KV_ONLY, MASKED
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch
from vllm_buddy.models.folder import load_tokenizer

BUDGETS = (1.0, 0.875, 0.75, 0.5)
KV_MIB = 512
NUM_USERS, NUM_TURNS = 16, 3
SYSTEM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 1000, 64, 48
STEPS_BETWEEN_USERS = 4
NUM_CHECKED, CHECKED_TOKENS = 4, 64
STOCK = "stock"


@dataclass(frozen=True)
class Served:
    """One thing to measure. variants: one per budget of its users, of one engine."""

    name: str
    variants: Sequence[Variant]
    layout: str | None = None
    kv_policy: str | None = None
    prompts: str | None = None

    def of_user(self, user: int) -> Variant:
        """The variant that the requests of a user have."""
        return self.variants[user % len(self.variants)]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.conversations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rounds_option(parser, 5)
    args = parser.parse_args()
    env = environment()
    model, artifact = fetch(report=print), load_artifact(SHIPPED_DIR / DEFAULT_MODEL)
    text = load_tokenizer(model)("\n\n".join(passages()), add_special_tokens=False, verbose=False)["input_ids"]
    rng = np.random.default_rng(0)
    checked = [_passage(text, rng, CHECKED_TOKENS) for _ in range(NUM_CHECKED)]
    served = []
    reference: Reference | None = None
    for one in start(str(model), artifact):
        reference = reference or Reference(model, artifact, one.variants[0].llm.llm_engine.model_config.dtype)
        for variant in one.variants:
            reference.check(variant, checked, engines.second_token_logprobs(variant, checked))
        served.append(one)
    rounds = Rounds(args.rounds)
    rounds.mark_checked(one.name for one in served)
    for index in range(-1, args.rounds):  # the first warms up
        conversations = draw(text, rng)
        for one in in_turn(served, index):
            figures = run(one, conversations)
            if index >= 0:
                rounds.add(index, one.name, **figures)
        print(f"round {index + 1} of {args.rounds} done", flush=True)
    report(RESULTS_DIR / f"{device()}_conversations.jsonl", rows_of(served, rounds), env)
    return 0


def start(model: str, artifact: Artifact) -> Iterator[Served]:
    """Start the engines one by one, and yield what each can serve; stock vLLM first."""
    from vllm import LLM

    options: dict[str, Any] = {
        "max_model_len": 2048,
        "max_num_seqs": NUM_USERS,
        "kv_cache_memory_bytes": KV_MIB << 20,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
    }
    num_layers, router = artifact.config.base_model.num_layers, artifact.router()
    stock = Variant(name=STOCK, layers=num_layers, path=full_path(num_layers), llm=LLM(model, **options))
    yield Served(STOCK, [stock])
    for layout, kv_policy in (("dense", MASKED), ("units", MASKED), ("dense", KV_ONLY)):
        settings = {"kv_layout": layout, "kv_policy": kv_policy}
        llm = LLM(model, model_impl="buddy", additional_config={"buddy": settings}, **options)
        schedule = engines.core(llm).scheduler._routes.schedule
        for full_prompt in (False, True):
            prompts = "full" if full_prompt else "routed"
            name = f"{layout}, {kv_policy}, {prompts}"
            variants = [
                Variant(
                    name=f"{name}, {budget}",
                    layers=depth_for_budget(budget, num_layers),
                    llm=llm,
                    budget=budget,
                    router=router,
                    schedule=schedule,
                    kv_policy=kv_policy,
                    full_prompt=full_prompt,
                )
                for budget in BUDGETS
            ]
            yield Served(name, variants, layout, kv_policy, prompts)


@dataclass(frozen=True)
class Conversations:
    """What all users send. system: [SYSTEM_TOKENS]. questions: [users][turns][QUESTION_TOKENS]."""

    system: list[int]
    questions: list[list[list[int]]]


def draw(text: Sequence[int], rng: np.random.Generator) -> Conversations:
    """Draw passages of a text as system prompt and questions."""
    questions = [[_passage(text, rng, QUESTION_TOKENS) for _ in range(NUM_TURNS)] for _ in range(NUM_USERS)]
    return Conversations(_passage(text, rng, SYSTEM_TOKENS), questions)


def _passage(text: Sequence[int], rng: np.random.Generator, num_tokens: int) -> list[int]:
    start = int(rng.integers(len(text) - num_tokens))
    return list(text[start : start + num_tokens])


def run(served: Served, conversations: Conversations) -> dict[str, float]:
    """Let all users talk at once, and return the figures of the run.

    Raises:
        Refused: the prefix cache could not be emptied, or an answer has another length than asked.
    """
    served.variants[0].prepare()
    if not served.variants[0].llm.reset_prefix_cache():
        raise Refused(f"the prefix cache of '{served.name}' could not be emptied")
    talk = Talk(served, conversations)
    began = time.perf_counter()
    num_steps = 0
    while talk.goes_on:
        if num_steps % STEPS_BETWEEN_USERS == 0 and (user := num_steps // STEPS_BETWEEN_USERS) < NUM_USERS:
            talk.ask(user)
        talk.step()
        num_steps += 1
    seconds = time.perf_counter() - began
    return {
        "hit_rate": talk.num_cached_tokens / talk.num_prompt_tokens,
        "ttft_ms": float(np.mean(talk.ttft_s)) * 1e3,
        "tokens_per_s": NUM_USERS * NUM_TURNS * ANSWER_TOKENS / seconds,
    }


class Talk:
    """The conversations of all users with one engine.

    ttft_s: time to the first token of each request. num_prompt_tokens, num_cached_tokens: of the prompts of all
    requests, and how many of them the prefix cache had.
    """

    def __init__(self, served: Served, conversations: Conversations) -> None:
        self.ttft_s: list[float] = []
        self.num_prompt_tokens = self.num_cached_tokens = 0
        self._served = served
        self._engine = served.variants[0].llm.llm_engine
        self._histories = [list(conversations.system) for _ in range(NUM_USERS)]
        self._questions = [list(questions) for questions in conversations.questions]
        self._user_of: dict[str, int] = {}
        self._asked_at: dict[str, float] = {}  # of requests without a token

    @property
    def goes_on(self) -> bool:
        """Whether a user waits for an answer, or has not asked all questions."""
        return bool(self._user_of) or any(self._questions)

    def ask(self, user: int) -> None:
        """Send the next question of a user."""
        from vllm import SamplingParams

        self._histories[user] += self._questions[user].pop(0)
        params = SamplingParams(
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args=self._served.of_user(user).extra_args,
        )
        name = f"{user}-{time.monotonic_ns()}"
        self._user_of[name], self._asked_at[name] = user, time.perf_counter()
        self._engine.add_request(name, {"prompt_token_ids": list(self._histories[user])}, params)

    def step(self) -> None:
        """Run one step; users whose question is answered ask the next one."""
        for output in self._engine.step():
            if output.request_id in self._asked_at:
                self.ttft_s.append(time.perf_counter() - self._asked_at.pop(output.request_id))
            if output.finished:
                self._answered(output)

    def _answered(self, output: Any) -> None:
        answer, user = list(output.outputs[0].token_ids), self._user_of.pop(output.request_id)
        if len(answer) != ANSWER_TOKENS:
            raise Refused(f"'{self._served.name}' gave {len(answer)} of {ANSWER_TOKENS} tokens; nothing is said of it")
        self.num_prompt_tokens += len(output.prompt_token_ids)
        self.num_cached_tokens += output.num_cached_tokens
        self._histories[user] += answer
        if self._questions[user]:
            self.ask(user)


def rows_of(served: Sequence[Served], rounds: Rounds) -> list[dict[str, Any]]:
    """One row per figure; those of buddy over those of stock vLLM too, by rounds."""
    rows = []
    for one in served:
        about = {"variant": one.name, "layout": one.layout, "kv_policy": one.kv_policy, "prompts": one.prompts}
        for metric in ("hit_rate", "ttft_ms", "tokens_per_s"):
            rows.append(rounds.row(metric, rounds.values(metric, one.name), **about))
            if one.name != STOCK:
                rows.append(rounds.row(f"{metric}_over_stock", rounds.ratio(metric, one.name, STOCK), **about))
    return rows


if __name__ == "__main__":
    sys.exit(main())
