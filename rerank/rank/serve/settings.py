"""Settings of `rerank serve` that vLLM has no option for; they reach its API server by the environment."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

VARIABLE, KEY = "RERANK_SERVE", "RERANK_API_KEY"
VLLM_KEY = "VLLM_API_KEY"  # which in vLLM guards /v1 and /v2 alone


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server.

    Attributes:
        unknown: `last`, `drop` or `refuse`: what becomes of documents that the model does not know.
        one_token: Whether the first label's probabilities rank.
        max_queue: Requests that are accepted and not answered, at most.
        max_body_mb: Megabytes of a body, at most.
        api_key: That every route but `/health` asks for; None for none.
    """

    unknown: str = "last"
    one_token: bool = False
    max_queue: int = 256
    max_body_mb: float = 4.0
    api_key: str | None = None

    def as_environment(self) -> dict[str, str]:
        """The variables that `of_environment` reads."""
        settings = asdict(self)
        key = settings.pop("api_key")
        return {VARIABLE: json.dumps(settings), **({KEY: key} if key else {})}

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "ServeSettings":
        """The settings of a server that `rerank serve` started, or whoever ran the line that it prints."""
        key = environment.get(KEY) or environment.get(VLLM_KEY) or None
        return cls(**json.loads(environment.get(VARIABLE, "{}")), api_key=key)
