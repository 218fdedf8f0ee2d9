"""OpenAI's client against a running server: an answer at once, a stream, and several requests side by side.

vllm-buddy serve
python examples/openai_client.py [http://localhost:8000/v1]
"""

import asyncio
import sys
from typing import Any

from openai import AsyncOpenAI, OpenAI

MODEL = "smollm2-135m"


def request(prompt: str, **options: Any) -> dict[str, Any]:
    """A request with options of the plugin, such as buddy_budget=0.5."""
    messages = [{"role": "user", "content": prompt}]
    extra = {"vllm_xargs": options}
    return {"model": MODEL, "messages": messages, "max_tokens": 32, "temperature": 0, "extra_body": extra}


def at_once(client: OpenAI) -> None:
    reply = client.chat.completions.create(**request("Why is the sky blue?", buddy_budget=0.75))
    ran = reply.kv_transfer_params["buddy"]
    print(f"at once, {ran['depth']} layers: {reply.choices[0].message.content}")


def streaming(client: OpenAI) -> None:
    """With buddy_paths, chunks without choices tell which layers the tokens ran; the last has the whole outcome."""
    asked = request("Why is the sky blue?", buddy_budget=0.5, buddy_paths=True)
    outcome: dict[str, Any] = {}
    print("streamed: ", end="")
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        outcome = (getattr(chunk, "kv_transfer_params", None) or {}).get("buddy", outcome)
    print(f"\n  ran {outcome['depth']} layers, paths {outcome['paths']['runs']}")


async def side_by_side(client: AsyncOpenAI) -> None:
    """Requests of different budgets run in one batch."""
    budgets = (1.0, 0.75, 0.5)
    asked = [client.chat.completions.create(**request("Name a colour.", buddy_budget=b)) for b in budgets]
    for budget, reply in zip(budgets, await asyncio.gather(*asked)):
        print(f"side by side, budget {budget}: {reply.choices[0].message.content}")


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
    client = OpenAI(base_url=url, api_key="none")
    at_once(client)
    streaming(client)
    asyncio.run(side_by_side(AsyncOpenAI(base_url=url, api_key="none")))


if __name__ == "__main__":
    main()
