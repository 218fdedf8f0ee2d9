"""A client of the chat completions API that sends options of the plugin with each request and times the answer."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_buddy.errors import ServerError
from vllm_buddy.serving.admission.option_names import BUDGET_KEY, OUTCOME_KEY

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import CompletionUsage
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    budget: as it was asked for, a number or "auto".
    outcome: what the plugin reports about the request (`kv_transfer_params.buddy` of the response, or of a chunk).
    """

    prompt: str
    budget: float | str
    text: str
    num_prompt_tokens: int
    num_tokens: int
    elapsed_s: float
    outcome: dict[str, Any] | None

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second from the request to the last token, prefill included."""
        return self.num_tokens / self.elapsed_s


@dataclass(frozen=True)
class ChatClient:
    """Sends chat requests to the server at `host`:`port`. May be used from several threads at once.

    num_tokens: length of every answer. It is fixed because prefill would dominate the rate of a short answer.
    """

    host: str
    port: int
    model: str
    num_tokens: int

    def ask(self, prompt: str, budget: float | str, *, stream: bool = False, **options: Any) -> Answer:
        """Send one request with greedy sampling and read the whole answer.

        options: of the plugin, such as buddy_paths=True.

        Raises:
            ServerError: the server refuses the request, breaks off the answer or goes away.
        """
        import httpx
        import openai

        completions = self._openai.chat.completions
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.num_tokens,
            "extra_body": {"min_tokens": self.num_tokens, "vllm_xargs": {BUDGET_KEY: budget, **options}},
        }
        start = time.perf_counter()
        try:
            if stream:
                chunks = completions.create(**request, stream=True, stream_options={"include_usage": True})
                text, usage, outcome = _read_stream(chunks)
            else:
                text, usage, outcome = _read_whole(completions.create(**request))
        except openai.APIStatusError as error:
            raise ServerError(f"the server answered {error.status_code}: {error.response.text}") from None
        except (openai.APIConnectionError, httpx.TransportError) as error:  # openai 2 does not wrap those of a stream
            cause = error.__cause__ or error
            raise ServerError(f"the server went away during a request ({type(cause).__name__}: {cause})") from None
        except openai.APIError as error:
            raise ServerError(f"the server broke off an answer: {error.body or error.message}") from None
        return Answer(
            prompt, budget, text, usage.prompt_tokens, usage.completion_tokens, time.perf_counter() - start, outcome
        )

    @cached_property
    def _openai(self) -> "OpenAI":
        from openai import DefaultHttpxClient, OpenAI

        return OpenAI(
            base_url=f"http://{self.host}:{self.port}/v1",
            api_key="none",
            max_retries=0,
            timeout=_TIMEOUT_S,
            # The server closes idle connections, and a request that is sent at that moment fails.
            default_headers={"Connection": "close"},
            # The server is local: a proxy from the environment would not reach it.
            http_client=DefaultHttpxClient(trust_env=False),
        )


def _read_whole(answer: "ChatCompletion") -> tuple[str, "CompletionUsage", dict[str, Any] | None]:
    if answer.usage is None:
        raise ServerError("the server sent an answer without its usage")
    return answer.choices[0].message.content or "", answer.usage, _outcome(answer)


def _read_stream(
    chunks: "Iterable[ChatCompletionChunk]",
) -> tuple[str, "CompletionUsage", dict[str, Any] | None]:
    parts: list[str] = []
    usage = outcome = None
    for chunk in chunks:
        outcome = _outcome(chunk) or outcome
        parts += [choice.delta.content or "" for choice in chunk.choices]
        if chunk.usage is not None:
            usage = chunk.usage
    if usage is None:
        raise ServerError("the server broke off an answer: the stream ended before its usage arrived")
    return "".join(parts), usage, outcome


def _outcome(answer: "ChatCompletion | ChatCompletionChunk") -> dict[str, Any] | None:
    return (getattr(answer, "kv_transfer_params", None) or {}).get(OUTCOME_KEY)
