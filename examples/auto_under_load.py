"""Budget "auto" on a server whose price follows the load: the more requests at once, the fewer layers.

vllm-buddy serve --additional-config '{"buddy": {"load": {"price": 12, "running": [1, 4]}}}'
python examples/auto_under_load.py [http://localhost:8000/v1]
"""

import asyncio
import sys
import time
from statistics import fmean

from openai import AsyncOpenAI

PROMPT = "Tell me a story about a lost dog."
AT_ONCE = (1, 2, 4, 8)
TOKENS = 32


async def burst(client: AsyncOpenAI, num: int) -> tuple[list[float], float]:
    """Send `num` requests at once; returns the layers per token of each, and tokens/s of all."""
    start = time.perf_counter()
    replies = await asyncio.gather(
        *(
            client.chat.completions.create(
                model="smollm2-135m",
                messages=[{"role": "user", "content": PROMPT}],
                max_tokens=TOKENS,
                temperature=0,
                # Price 0 without load: a request alone runs all layers.
                extra_body={"vllm_xargs": {"buddy_budget": "auto", "buddy_price": 0.0}},
            )
            for _ in range(num)
        )
    )
    rate = sum(reply.usage.completion_tokens for reply in replies) / (time.perf_counter() - start)
    return [reply.kv_transfer_params["buddy"]["layers_executed_mean"] for reply in replies], rate


async def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
    client = AsyncOpenAI(base_url=url, api_key="none")
    print("at once  layers a token  tokens/s")
    for num in AT_ONCE:
        layers, rate = await burst(client, num)
        print(f"{num:7}  {fmean(layers):14.1f}  {rate:8.0f}")


if __name__ == "__main__":
    asyncio.run(main())
