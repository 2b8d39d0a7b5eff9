"""The wire format of a rerank request and of its answer, as Cohere, Jina, LiteLLM and vLLM speak it.

N documents of a request.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

API_VERSION = {"version": "2"}
MOST_DIGITS = 300  # of a number that is a float without a look


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: Of the HTTP answer.
        message: Why, in one line.
        retry_after: Seconds after which to ask again; None where that would not help.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        self.status, self.message, self.retry_after = status, " ".join(message.split()), retry_after
        super().__init__(self.message)

    @property
    def body(self) -> dict[str, Any]:
        """The answer, in Cohere's shape (`message`) and in that of OpenAI and vLLM (`error`)."""
        error = {"message": self.message, "type": "invalid_request" if self.status < 500 else "server_error"}
        return {"message": self.message, "error": {**error, "code": self.status}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class RerankRequest(BaseModel):
    """A request; keys of other servers that are not here (`rank_fields`, `max_tokens_per_doc` ...) are left alone.

    Attributes:
        model: As it is served; None for the one there is.
        query: A field of the request, if the model was trained with one; else `{history, context}`, or ids of the
            history, one a line, oldest first.
        documents: (N,) catalogue ids, texts, or objects with `id`, fields or `text`.
        top_n: Results at most; None or 0 for all.
        return_documents: Whether results repeat their documents.
        history: Item ids, oldest first, in place of the query's.
        context: Values that prompts show, by their names.
        scores: (N,) of the first stage.
        top_k: The best to be written by the model, the others follow in the order shown; None for those that it was
            trained to write.
        explain: Whether the answer has the reasoning.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    query: str | dict[str, Any] = ""
    documents: list[Any]
    top_n: int | None = Field(default=None, ge=0)
    return_documents: bool | None = False
    history: list[Any] | None = None
    context: dict[str, Any] | None = None
    scores: list[Any] | None = None
    top_k: int | None = Field(default=None, ge=1)
    explain: bool | None = False


def read_request(body: bytes) -> RerankRequest:
    """The request of a body.

    Raises:
        Refusal: For a body that is no JSON, or not of this form.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer)
        if b"\\ud" in body.lower():  # half of a surrogate pair, which JSON can escape and no tokenizer can read
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply; send an object with query and documents") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}; send an object with query and documents") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is {type(value).__name__}, no object; send query and documents")
    try:
        return RerankRequest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise Refusal(400, f"{first['loc'][0]}: {first['msg']}; correct it") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON, give null where a number is unknown")


def _finite(text: str) -> float:
    """A number; one that is no float is refused, as no answer could repeat it."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is larger than any number that is read")
    return number


def _integer(text: str) -> int:
    """A number without a fraction that is a float too."""
    if len(text) > MOST_DIGITS:
        _finite(text)
    return int(text)


@dataclass(frozen=True)
class Ranking:
    """A ranked request.

    Attributes:
        order: Numbers of documents, best first; those that are left out are not there.
        scores: Of each, falling.
        measure: The meaning of the scores: `1/rank`, or `probability` of being first.
        trace: The reasoning; None where nothing was written.
        prompt_tokens: Of the prompt; 0 where no model was asked.
        output_tokens: Of the answer.
    """

    order: Sequence[int]
    scores: Sequence[float]
    measure: str
    trace: str | None
    prompt_tokens: int = 0
    output_tokens: int = 0


def response(
    request_id: str, model: str, request: RerankRequest, ranking: Ranking, warnings: Sequence[str]
) -> dict[str, Any]:
    """The answer to a request."""
    results: list[dict[str, Any]] = []
    for place, score in list(zip(ranking.order, ranking.scores, strict=True))[: request.top_n or None]:
        results.append({"index": place, "relevance_score": score})
        if request.return_documents:
            results[-1]["document"] = _document(request.documents[place])
    tokens = {"input_tokens": ranking.prompt_tokens, "output_tokens": ranking.output_tokens}
    meta: dict[str, Any] = {"api_version": API_VERSION, "tokens": tokens, "relevance_score": ranking.measure}
    usage = {"prompt_tokens": ranking.prompt_tokens, "total_tokens": sum(tokens.values())}
    answer: dict[str, Any] = {"id": request_id, "model": model, "results": results, "usage": usage, "meta": meta}
    if warnings:
        meta["warnings"] = list(warnings)
    if request.explain:
        answer["trace"] = ranking.trace
    return answer


def _document(document: Any) -> dict[str, Any]:
    """A document as clients read it: an object with a text."""
    if isinstance(document, dict):
        text = document.get("text")
        return {**document, "text": text if text is not None else str(document.get("title") or document["id"])}
    return {"text": document}
