"""Starts a vLLM engine in this process that a test can reach into, and compares it with the reference."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness.tiny_models import PREDICTOR_DEPTHS, TOKEN_DEPTHS, load_model, random_artifact, save_tiny_model
from vllm_buddy.artifact import Artifact
from vllm_buddy.method import (
    PathSchedule,
    RequestRoute,
    Route,
    SplitRoute,
    TokenRoute,
    TokenSchedule,
    depth_for_budget,
    path_of,
)
from vllm_buddy.method.reference import GeneratedSequence, generate

BLOCK_SIZE = 32
MAX_MODEL_LEN = 512
MAX_TOKENS_PER_STEP = 8192
USUAL_PARTS = {"bypass_rank": 4, "predictor_depths": PREDICTOR_DEPTHS, "token_depths": TOKEN_DEPTHS}
SAVED_LAYERS = 12  # of a token schedule: so few that the account is full at times, and empty at others

ByToken = tuple[bool, bool]  # whether tokens of the prompt, and decoded ones, have depths of their own
MAX_STEPS = 5000  # so that a request that never ends fails its test instead of hanging it

# The first engine that vLLM ends takes down state that all engines of the process share, so all live until its end.
_STARTED: list[Any] = []


@dataclass(frozen=True)
class Ask:
    """One request. budget: None sends none. context: None is the whole prompt. options: others of the plugin.

    adapter: vLLM's LoRARequest.
    """

    prompt: tuple[int, ...]
    budget: float | None = 1.0
    max_tokens: int = 8
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    context: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    adapter: Any = None

    @property
    def extra_args(self) -> dict[str, Any] | None:
        """Options that the request passes to the plugin."""
        options = {"buddy_budget": self.budget, "buddy_context_tokens": self.context, **self.options}
        return {key: value for key, value in options.items() if value is not None} or None


def paths_told(told: Mapping[str, Any]) -> list[int]:
    """The path of each token, from the form that runs have in a response."""
    return [path_of(told["layers"][index]) for num_tokens, index in told["runs"] for _ in range(num_tokens)]


@dataclass
class Tiny:
    """A random model with a random artifact, and the reference's results so far."""

    folder: Path
    artifact_folder: Path
    model: nn.Module
    artifact: Artifact
    known: dict[Any, GeneratedSequence] = field(default_factory=dict)

    def expected(
        self,
        ask: Ask,
        policy: str,
        schedule: PathSchedule,
        *,
        library: bool = False,
        bypass: bool = True,
        by_token: ByToken = (False, False),
    ) -> GeneratedSequence:
        """Return what the reference generates for `ask`."""
        # In greedy decoding a shorter answer is the beginning of a longer one, so one run serves several lengths.
        length = -(-ask.max_tokens // 8) * 8
        kind = ask.options.get("buddy_prompt")
        key = (ask.prompt, ask.budget, policy, schedule, library, bypass, length, ask.context, by_token, kind)
        if key not in self.known:
            route = self.route(ask, schedule, library=library, by_token=by_token)
            repair = self.artifact.bypass if bypass else None
            self.known[key] = generate(self.model, route, ask.prompt, length, policy, repair)
        whole = self.known[key]
        positions = len(ask.prompt) + ask.max_tokens - 1
        return GeneratedSequence(
            whole.token_ids[: ask.max_tokens], whole.paths[:positions], whole.logprobs[: ask.max_tokens]
        )

    def route(
        self, ask: Ask, schedule: PathSchedule, *, library: bool = False, by_token: ByToken = (False, False)
    ) -> Route:
        """Return the route of a request, put together here and not by the code that serves."""
        budget, num_layers = ask.budget or 1.0, self.artifact.config.base_model.num_layers
        depth = depth_for_budget(budget, num_layers)
        router, tokens = self.artifact.router(library=library), self.artifact.token
        whole = RequestRoute(router, schedule, depth, ask.prompt, ask.context)
        if ask.options.get("buddy_prompt") == "full" and depth < num_layers:
            decoded: Route = whole
            if by_token[1] and tokens is not None and depth >= tokens.depths[0]:
                account = TokenSchedule(SAVED_LAYERS, schedule.lag)
                decoded = TokenRoute(tokens, account, budget, ask.prompt, len(ask.prompt))
            return SplitRoute(RequestRoute(router, schedule, num_layers, ask.prompt), decoded, len(ask.prompt))
        if by_token == (False, False) or tokens is None or not tokens.depths[0] <= depth < num_layers:
            return whole
        in_prompt, in_decode = by_token
        start = 0 if in_prompt else len(ask.prompt)
        single = TokenRoute(tokens, TokenSchedule(SAVED_LAYERS, schedule.lag), budget, ask.prompt, start)
        if in_prompt and in_decode:
            return single
        return SplitRoute(*((single, whole) if in_prompt else (whole, single)), len(ask.prompt))


def make_tiny(root: Path, family: str, config: Mapping[str, Any] | None = None, **parts: Any) -> Tiny:
    """Write the model and the artifact under `root`.

    config: changes of the model's configuration. parts: of the artifact, see random_artifact; without any, it has a
        bypass and a Budget Predictor.
    """
    folder = save_tiny_model(root / "model", family, **(config or {}))
    artifact = random_artifact(root / "artifact", folder, **(parts or USUAL_PARTS))
    model = load_model(folder)
    if artifact.lora is not None:
        artifact.lora.merge_into(model)
    return Tiny(folder, root / "artifact", model, artifact)


def start_engine(tiny: Tiny, *, model_impl: str = "buddy", **overrides: Any) -> "Engine":
    """Start an engine in this process: fp32, eager, no tokenizer, K and V weights kept for every KV policy."""
    from vllm import LLM

    settings = {
        "artifact": str(tiny.artifact_folder),
        "kv_policy": "kv_only",
        "paths": "free",
        **overrides.pop("buddy", {}),
    }
    options: dict[str, Any] = {
        "model_impl": model_impl,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": MAX_TOKENS_PER_STEP,
        "max_num_seqs": 16,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": 32 << 20,
        "seed": 0,
        # On a GPU vLLM takes a share of the memory. Each engine of a process needs only a little.
        **({"gpu_memory_utilization": 0.05} if torch.cuda.is_available() else {}),
        **overrides,
    }
    if model_impl == "buddy":
        options["additional_config"] = {"buddy": settings}
    _STARTED.append(LLM(str(tiny.folder), **options))
    return Engine(_STARTED[-1], tiny)


class Engine:
    """An engine that is driven step by step and whose settings change between requests."""

    def __init__(self, llm: Any, tiny: Tiny) -> None:
        self.llm = llm
        self.tiny = tiny
        self.core = llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.policy = "kv_only"
        self.schedule = PathSchedule(16)
        self.library = False
        self.bypass = True
        self.by_token: ByToken = (False, False)
        self.finished: dict[str, Any] = {}
        self._cuda_capture: Any = None
        self._num_requests = 0
        self._preempted: set[str] = set()  # vLLM's ids of requests
        self._watch_preemptions()
        self.run([Ask((1,), None, 1)])  # layers and bypasses are compiled at the first step
        self._backbone = self.runner.model.model
        self._bypasses = getattr(self._backbone, "bypasses", None)

    # --- settings ----------------------------------------------------------------------------------------------

    def configure(
        self,
        policy: str = "masked",
        interval: int = 16,
        lag: int = 0,
        chunk: int = MAX_TOKENS_PER_STEP,
        *,
        library: bool = False,
        bypass: bool = True,
        by_token: ByToken = (False, False),
    ) -> None:
        """Set KV policy, schedule, bypass and tokens per step, and empty the prefix cache."""
        assert not self.core.scheduler.has_unfinished_requests()
        self.state.graphs = None
        artifact = self.tiny.artifact
        lag = max(lag, int(self.core.vllm_config.scheduler_config.async_scheduling))
        self.policy, self.schedule, self.library, self.bypass = policy, PathSchedule(interval, lag), library, bypass
        self._backbone.bypasses = self._bypasses if bypass else None
        self.state.policy = self.state.new_policy(policy)
        self.scheduler._salt_prefix = f"{artifact.digest}:{policy}"
        routes = self.scheduler._routes
        routes.schedule, routes.router, self.by_token = self.schedule, artifact.router(library=library), by_token
        routes.token_schedule, routes._by_token = TokenSchedule(SAVED_LAYERS, lag), by_token
        self.scheduler.max_num_scheduled_tokens = chunk
        self.empty_prefix_cache()

    @property
    def state(self) -> Any:
        return self.runner.buddy_state

    def capture(self, sizes: Sequence[int], memory_limit: int = 1 << 30, most_paths: int = 100) -> Any:
        """Run decode steps of these sizes as CUDA graphs until the next `configure`.

        Without a GPU, a captured function is replayed by calling it again. The engine must have been started with
        kernels. Each captured function counts as one byte of memory.
        """
        from vllm_buddy_kernels import KERNELS

        from vllm_buddy.serving.graphs.capture import CudaCapture
        from vllm_buddy.serving.graphs.decode import DecodeGraphs

        if self._cuda_capture is None and self.runner.device.type == "cuda":
            self._cuda_capture = CudaCapture(self.runner.device)

        def capture(bodies: Any, warm_up: bool = False) -> Any:
            if self._cuda_capture is not None:
                return self._cuda_capture(bodies, warm_up)[0], len(bodies)
            for body in bodies if warm_up else ():
                body()
            return list(bodies), len(bodies)

        backbone = self.runner.model.model
        with torch.inference_mode():
            self.state.graphs = DecodeGraphs(
                backbone,
                backbone.bypasses,
                self.state.policy,
                kernels=KERNELS[self.core.vllm_config.additional_config["buddy"]["kernels"]],
                builder=self.state.builder,
                block_size=self.state.block_size,
                vllm_config=self.core.vllm_config,
                sizes=sizes,
                memory_limit=memory_limit,
                capture=capture,
            )
            self.state.graphs.capture_pieces()
        self.state.graphs.paths.limit = most_paths
        return self.state.graphs

    @property
    def num_blocks_in_use(self) -> int:
        """KV blocks that requests hold, without the null block, which vLLM keeps."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def empty_prefix_cache(self) -> None:
        assert self.scheduler.reset_prefix_cache()

    # --- requests ----------------------------------------------------------------------------------------------

    def add(self, ask: Ask, request_id: str | None = None, cache_salt: str | None = None) -> str:
        """Send a request and return its id."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._num_requests += 1
        request_id = request_id or f"r{self._num_requests}"
        options = {
            "temperature": 0.0,
            "max_tokens": ask.max_tokens,
            "detokenize": False,
            "extra_args": ask.extra_args,
            "output_kind": RequestOutputKind.FINAL_ONLY,
            **ask.sampling,
        }
        prompt: dict[str, Any] = {"prompt_token_ids": list(ask.prompt)}
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        self.llm.llm_engine.add_request(request_id, prompt, SamplingParams(**options), lora_request=ask.adapter)
        return request_id

    def run(
        self,
        asks: Sequence[Ask],
        arrivals: Sequence[int] | None = None,
        before_step: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Serve `asks` and return their final outputs.

        arrivals: for each request, the step before which it is sent. before_step: called with the number of each step
        before the step is scheduled.
        """
        arrivals = arrivals or [0] * len(asks)
        ids: dict[int, str] = {}
        for step in range(MAX_STEPS):
            for index, arrival in enumerate(arrivals):
                if arrival == step:
                    ids[index] = self.add(asks[index])
            if before_step is not None:
                before_step(step)
            self.step()
            if len(ids) == len(asks) and all(i in self.finished for i in ids.values()):
                break
        else:
            raise AssertionError(f"not finished after {MAX_STEPS} steps")
        return [self.finished.pop(ids[index]) for index in range(len(asks))]

    def step(self) -> None:
        """Run one engine step. Outputs of requests that finish go to `finished`."""
        for output in self.llm.llm_engine.step():
            if output.finished:
                self.finished[output.request_id] = output

    def finish(self) -> dict[str, Any]:
        """Step until no request is left, and return the outputs of all that have finished by then."""
        for _ in range(MAX_STEPS):
            if not self.llm.llm_engine.has_unfinished_requests():
                break
            self.step()
        outputs, self.finished = self.finished, {}
        return outputs

    def abort(self, request_id: str) -> None:
        self.llm.llm_engine.abort_request([request_id])

    def abort_all(self) -> None:
        """Make the engine idle, even after a failed test."""
        self.scheduler.finish_requests(None, _aborted())
        self.llm.llm_engine.abort_request(list(self.llm.llm_engine.output_processor.request_states))
        for _ in range(2):  # vLLM tells the runner about finished requests in the next step
            self.step()
        self.finished = {}

    # --- disturbances ------------------------------------------------------------------------------------------

    def preempt(self, index: int) -> bool:
        """Preempt the running request at `index` (modulo their number), as vLLM does when it runs out of blocks."""
        running = self.scheduler.running
        if not running:
            return False
        request = running.pop(index % len(running))
        self.scheduler._preempt_request(request, time.monotonic())
        # It may be scheduled again in the next step. vLLM does the same where it preempts between steps.
        self.scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        return True

    def preempt_all(self) -> None:
        """Preempt all running requests and empty the prefix cache."""
        assert self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def _watch_preemptions(self) -> None:
        """Note the requests that are preempted, by a test or by vLLM itself."""
        preempt = self.scheduler._preempt_request

        def watched(request: Any, *args: Any, **kwargs: Any) -> Any:
            self._preempted.add(request.request_id)
            return preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = watched

    def _was_preempted(self, request_id: str) -> bool:
        """request_id: as it was sent, to which vLLM adds something."""
        return any(known == request_id or known.startswith(f"{request_id}-") for known in self._preempted)

    # --- comparison --------------------------------------------------------------------------------------------

    def expected(self, ask: Ask) -> GeneratedSequence:
        """Return what the reference generates for `ask` under the current settings."""
        return self.tiny.expected(
            ask, self.policy, self.schedule, library=self.library, bypass=self.bypass, by_token=self.by_token
        )

    def check(self, asks: Sequence[Ask], outputs: Sequence[Any]) -> None:
        """Fail unless the tokens and layers of every request are the reference's."""
        for ask, output in zip(asks, outputs, strict=True):
            expected = self.expected(ask)
            assert list(output.outputs[0].token_ids) == expected.token_ids, _describe(self, ask, output, expected)
            depths = [path.bit_count() for path in expected.paths]
            outcome = output.kv_transfer_params["buddy"]
            assert (outcome["layers_executed_min"], outcome["layers_executed_max"]) == (min(depths), max(depths))
            computed = depths[output.num_cached_tokens or 0 :]
            if self._was_preempted(output.request_id):  # tokens that are computed again are counted again
                assert outcome["tokens"] >= len(computed)
            else:
                assert outcome["tokens"] == len(computed)
                assert outcome["layers_executed_mean"] == pytest.approx(sum(computed) / len(computed))
            if True not in self.by_token:
                assert outcome["distinct_paths"] == len(set(expected.paths))


def _describe(engine: Engine, ask: Ask, output: Any, expected: GeneratedSequence) -> str:
    got = list(output.outputs[0].token_ids)
    return (
        f"policy {engine.policy}, {engine.schedule}, budget {ask.budget}, prompt of {len(ask.prompt)} tokens, "
        f"{output.num_cached_tokens} cached: {got} != {expected.token_ids}"
    )


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED
