"""One batch with a budget per prompt, and what each request ran.

python examples/offline.py
"""

from vllm import LLM, SamplingParams

from vllm_buddy.models.embedded import fetch

PROMPTS = ("The capital of France is", "Water boils at", "The opposite of cold is")
BUDGETS = (1.0, 0.75, 0.5)


def main() -> None:
    llm = LLM(str(fetch()), model_impl="buddy", max_model_len=1024, kv_cache_memory_bytes=256 << 20)
    prompts = [prompt for prompt in PROMPTS for _ in BUDGETS]
    params = [
        SamplingParams(temperature=0, max_tokens=16, extra_args={"buddy_budget": budget})
        for _ in PROMPTS
        for budget in BUDGETS
    ]
    for answer in llm.generate(prompts, params):
        ran = answer.kv_transfer_params["buddy"]
        text = " ".join(answer.outputs[0].text.split())
        print(f"{ran['budget']:<5} {ran['layers_executed_mean']:4.1f} layers   {answer.prompt} {text}")


if __name__ == "__main__":  # vLLM starts its engine in another process, which imports this file
    main()
