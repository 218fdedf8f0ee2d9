"""Lets a model answer questions at several budgets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import engines
from vllm_buddy.models.folder import load_tokenizer


def greedy_answers(
    model: Path, settings: Mapping[str, Any], questions: Sequence[str], budgets: Sequence[float], most_tokens: int
) -> dict[float, list[list[int]]]:
    """Return the answers at each budget as token ids, in the order of the questions. settings: of the plugin."""
    from transformers import GenerationConfig
    from vllm import SamplingParams

    tokenizer = load_tokenizer(model)
    stops = GenerationConfig.from_pretrained(model).eos_token_id
    llm = engines.start_engine(
        str(model), model_impl="buddy", additional_config={"buddy": dict(settings)}, enforce_eager=True, seed=0
    )
    prompts, sampling = [], []
    for budget in budgets:
        for question in questions:
            message = [{"role": "user", "content": question}]
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
            prompts.append({"prompt_token_ids": list(ids)})
            sampling.append(
                SamplingParams(
                    temperature=0,
                    max_tokens=most_tokens,
                    detokenize=False,
                    stop_token_ids=stops if isinstance(stops, list) else [stops],
                    extra_args={"buddy_budget": budget},
                )
            )
    found = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]
    return {budget: found[i * len(questions) : (i + 1) * len(questions)] for i, budget in enumerate(budgets)}
