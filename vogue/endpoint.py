"""A language model behind an OpenAI-compatible endpoint is asked, at http://HOST:8000/v1 say, where vLLM serves one.

The key, where one is needed, comes from the environment variable OPENAI_API_KEY.
"""

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException

PARALLEL = 16  # requests that are made at a time
AGAIN = (429, 500, 502, 503, 504)  # too many requests, and errors that may pass


class EndpointError(RuntimeError):
    """The endpoint can't be reached or doesn't answer as it should; the message names it and says how."""


@dataclass(frozen=True)
class Endpoint:
    """A client that asks `model` at `url`, the part before /chat/completions; safe to use from several threads.

    timeout  seconds a request may take
    pauses   seconds before each further try where a request fails in a way that may pass
    """

    url: str
    model: str
    timeout: float = 120.0
    pauses: tuple[float, ...] = (1.0, 4.0, 16.0)

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise EndpointError(f"{self.url}: an endpoint is http://HOST:PORT/v1 or https://HOST/v1")

    def reply(self, text: str) -> str:
        """What the model replies; raises EndpointError where the endpoint refuses, or fails again and again."""
        messages = [{"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 256}
        pauses = iter(self.pauses)
        while True:
            try:
                return self._post(body)
            except (OSError, HTTPException) as error:  # HTTPError and timeouts are OSErrors
                pause = next(pauses, None)
                if pause is None or getattr(error, "code", AGAIN[0]) not in AGAIN:
                    raise EndpointError(f"{self.url}: {_told(error)}") from None
            time.sleep(pause)

    def _post(self, body: dict) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            reply = response.read()
        try:
            return json.loads(reply)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError):
            raise EndpointError(f"{self.url}: not the reply of a chat completion: {reply[:200]!r}") from None


def _told(error: OSError | HTTPException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}: {error.read()[:200].decode(errors='replace')}"
    return str(getattr(error, "reason", error)) or type(error).__name__
