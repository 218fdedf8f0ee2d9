"""Ray Data: the rows of an offline batch, a budget for each, and what each ran.

pip install '.[ray]'
python examples/ray_data.py
"""

from typing import Any

import ray
from ray import serve
from ray.data.llm import ServeDeploymentProcessorConfig, build_processor
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.openai_api_models import CompletionRequest

from vllm_buddy.models.embedded import fetch

MODEL = "smollm2-135m"
PROMPTS = ("The capital of France is", "Water boils at", "The opposite of cold is")
BUDGETS = (1.0, 0.75, 0.5)


def deployment() -> serve.Application:
    """The engine. For several, see num_replicas and request_router_config in ray_serve.py."""
    return build_llm_deployment(
        LLMConfig(
            model_loading_config={"model_id": MODEL, "model_source": str(fetch())},
            accelerator_config={"kind": "cpu"},
            engine_kwargs={"model_impl": "buddy", "max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20},
            deployment_config={"num_replicas": 1, "health_check_timeout_s": 300},
            runtime_env={"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
        )
    )


def request(row: dict[str, Any]) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": row["prompt"], "max_tokens": 16, "temperature": 0}
    body["vllm_xargs"] = {"buddy_budget": row["budget"]}
    return {"method": "completions", "dtype": "CompletionRequest", "request_kwargs": body}


def result(row: dict[str, Any]) -> dict[str, Any]:
    ran = row["kv_transfer_params"]["buddy"]
    return {"budget": ran["budget"], "layers": ran["layers_executed_mean"], "answer": row["choices"][0]["text"]}


def main() -> None:
    ray.init("local", num_cpus=6)
    serve.run(deployment(), name="batch", route_prefix=None)
    config = ServeDeploymentProcessorConfig(
        deployment_name=f"LLMServer:{MODEL}",
        app_name="batch",
        dtype_mapping={"CompletionRequest": CompletionRequest},
        batch_size=8,
        concurrency=1,
    )
    rows = ray.data.from_items([{"prompt": prompt, "budget": budget} for prompt in PROMPTS for budget in BUDGETS])
    for row in build_processor(config, preprocess=request, postprocess=result)(rows).take_all():
        print(f"{row['budget']:<5} {row['layers']:4.1f} layers   {' '.join(row['answer'].split())}", flush=True)
    serve.shutdown()


if __name__ == "__main__":
    main()
