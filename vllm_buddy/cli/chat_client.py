"""One chat completion with a budget over HTTP, timed, with the standard library alone."""

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any

from vllm_buddy.errors import ServerError

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """What came back. outcome: the plugin's account of the request; the streaming API has no place for it."""

    prompt: str
    budget: float
    text: str
    num_tokens: int
    elapsed_s: float
    outcome: dict[str, Any] | None

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the time from request to last token, reading the prompt included."""
        return self.num_tokens / self.elapsed_s


@dataclass(frozen=True)
class ChatClient:
    host: str
    port: int
    model: str
    num_tokens: int  # of every answer: a model that ends early would have its rate set by the prompt

    def ask(self, prompt: str, budget: float, *, stream: bool = False) -> Answer:
        """Send one request, greedy, and read its answer to the end.

        Raises:
            ServerError: the server refuses the request or goes away.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.num_tokens,
            "min_tokens": self.num_tokens,
            "vllm_xargs": {"buddy_budget": budget},
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_TIMEOUT_S)
        start = time.perf_counter()
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ServerError(f"the server answered {response.status}: {response.read().decode(errors='replace')}")
            text, num_tokens, outcome = _read_stream(response) if stream else _read_whole(response)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"the server went away during a request ({type(error).__name__}: {error})") from None
        finally:
            connection.close()
        return Answer(prompt, budget, text, num_tokens, time.perf_counter() - start, outcome)


def _read_whole(response: http.client.HTTPResponse) -> tuple[str, int, dict[str, Any] | None]:
    answer = json.load(response)
    outcome = (answer.get("kv_transfer_params") or {}).get("buddy")
    return answer["choices"][0]["message"]["content"] or "", answer["usage"]["completion_tokens"], outcome


def _read_stream(response: http.client.HTTPResponse) -> tuple[str, int, None]:
    parts: list[str] = []
    num_tokens = 0
    for line in response:
        data = line.decode().removeprefix("data:").strip()
        if not line.startswith(b"data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise ServerError(f"the server broke off an answer: {event['error']}")
        for choice in event["choices"]:
            parts.append(choice["delta"].get("content") or "")
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
    return "".join(parts), num_tokens, None
