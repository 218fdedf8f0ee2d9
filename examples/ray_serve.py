"""Two replicas behind Ray Serve: requests at 0.5 go to one, those at 1.0 to the other.

pip install '.[ray]'
python examples/ray_serve.py [8000]
"""

import json
import os
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

# Loading a model keeps a small machine from answering Ray's checks of its HTTP proxy in time.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "120")

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_openai_app

from vllm_buddy.models.embedded import fetch
from vllm_buddy.ray import needs_plugin

MODEL = "smollm2-135m"
REPLICAS = 2
BUDGETS = (0.5, 1.0)
REQUESTS = 16


def config() -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": MODEL, "model_source": str(fetch())},
        accelerator_config={"kind": "cpu"},
        engine_kwargs={"model_impl": "buddy", "max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20},
        deployment_config={
            "num_replicas": REPLICAS,
            "health_check_timeout_s": 300,
            "request_router_config": RequestRouterConfig(request_router_class="vllm_buddy.ray.BudgetRouter"),
        },
        callback_config=needs_plugin(),  # else a node without this package serves the model unrouted
        # Replicas share the cores here; elsewhere name those of each, or leave it out on a GPU.
        runtime_env={"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}},
        experimental_configs={"num_ingress_replicas": 1},
    )


def ask(port: int, number: int) -> dict:
    budget = BUDGETS[number % len(BUDGETS)]
    body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions",
        json.dumps({**body, "vllm_xargs": {"buddy_budget": budget}}).encode(),
        # The id is in the replicas' logs: /tmp/ray/session_latest/logs/worker-*.err
        {"Content-Type": "application/json", "X-Request-ID": f"request-{number}-at-{budget}"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def main(port: int) -> None:
    ray.init("local", num_cpus=2 * REPLICAS + 4)  # a replica takes two: itself and its engine
    serve.start(http_options={"port": port})
    serve.run(build_openai_app({"llm_configs": [config()]}))
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(lambda number: ask(port, number), range(REQUESTS)):
            ran = answer["kv_transfer_params"]["buddy"]
            text = " ".join(answer["choices"][0]["text"].split())
            print(f"{ran['budget']:<5} {ran['layers_executed_mean']:4.1f} layers   {text}", flush=True)
    serve.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
