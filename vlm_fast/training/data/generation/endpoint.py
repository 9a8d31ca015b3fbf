"""An OpenAI-compatible endpoint, called through the ``openai`` client."""

from __future__ import annotations

import importlib
import os
from typing import Any

from vlm_fast.training.data.generation.answers import BadAnswer
from vlm_fast.training.data.generation.prompts import Message
from vlm_fast.training.data.generation.rate_limit import RateLimit
from vlm_fast.training.data.record_errors import describe

# HTTP status codes that every further request would get too.
FATAL = (401, 403, 404)
SECRET = 12  # characters; a shorter key, such as "none", may be a word of an answer
RETRIED = (408, 409, 429)  # these and 5xx are retried by the client


class Unavailable(RuntimeError):
    """The endpoint answers no request any more.

    Attributes:
        refused: whether it does not accept the key, the address or the model.
    """

    def __init__(self, why: str, refused: bool = False) -> None:
        super().__init__(why)
        self.refused = refused


class Refused(ValueError):
    """The endpoint refuses this request, and would refuse it again."""


class Endpoint:
    """Sends chat requests to a model. No text that it returns or raises contains the key.

    Args:
        model: its name at the endpoint.
        key_variable: the environment variable that holds the key.
        base_url: such as ``http://127.0.0.1:8000/v1``; None is the client's default.
        retries: of the client after 408, 409, 429, 5xx and lost connections; it respects
            ``Retry-After``.
        timeout: seconds to wait for an answer.
        limit: is waited for before each HTTP request, including retries.

    Raises:
        ModuleNotFoundError: the ``openai`` package is not installed.
        ValueError: the environment variable is not set, or holds no valid key.
    """

    def __init__(
        self,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        base_url: str | None = None,
        retries: int = 5,
        timeout: float = 120.0,
        limit: RateLimit | None = None,
    ) -> None:
        openai: Any = importlib.import_module("openai")  # an optional dependency
        self.model, self._errors, self._key = model, openai, _key(key_variable)
        # A hook of the HTTP client sees every request, the client's own retries too.
        hooks = {} if limit is None else {"request": [lambda request: limit.wait()]}
        self._client = openai.OpenAI(
            api_key=self._key, base_url=base_url, max_retries=retries, timeout=timeout,
            http_client=openai.DefaultHttpxClient(event_hooks=hooks),
        )  # fmt: skip

    def ask(self, messages: list[Message]) -> str:
        """Send messages and return the text of the answer.

        Raises:
            BadAnswer: the response has no text, or not all of it; asking again may help.
            Refused: the endpoint refuses this request.
            Unavailable: the key, the address or the model is not accepted, or the client's retries
                got no response.
        """
        # Exceptions of the client hold the request and its headers with the key, so none of them
        # may leave this method, not even as the cause of another.
        failure: Exception
        try:
            response = self._client.chat.completions.create(model=self.model, messages=messages)
            choice = response.choices[0]
            text, finished = choice.message.content, choice.finish_reason
        except self._errors.APIStatusError as error:
            code = error.status_code
            what = f"HTTP {code}: {describe(self._without_key(error.response.text), 300)}"
            every = code in FATAL or code in RETRIED or code >= 500
            failure = Unavailable(what, code in FATAL) if every else Refused(what)
        except self._errors.APIConnectionError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ else type(error).__name__
            failure = Unavailable(f"no connection to the endpoint ({cause})")
        except (self._errors.OpenAIError, AttributeError, TypeError, IndexError, ValueError) as e:
            failure = BadAnswer(f"expected a chat completion, got {type(e).__name__}")
        else:
            if not isinstance(text, str):
                failure = BadAnswer(f"expected text, got {type(text).__name__}")
            elif finished == "length":
                failure = BadAnswer("the answer was cut off", self._without_key(text))
            else:
                return self._without_key(text)
        raise failure

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[the key]") if len(self._key) >= SECRET else text


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(
            f"the environment variable {variable} is not set, expected the endpoint's key (any "
            "word for an endpoint that asks for none)"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"the environment variable {variable} holds letters that no key has")
    return key
