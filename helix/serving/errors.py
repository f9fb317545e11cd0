"""What a client is told when its request gets no answer: OpenAI's shape, with a status."""

from __future__ import annotations

import re
from typing import Any

_SETTING = re.compile(r"^([a-z_]+)(?:[.\[]\S*)? (?:=|is|has|needs|must|holds|exceeds) ")
_NAMED = re.compile(r"(^| )sampling\.([a-z_]+)")
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of the response.
        message: one line for people.
        param: the field that is at fault, where one is.
        code: a word for programs.
        retry_after_s: seconds after which it may go better.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s

    @classmethod
    def of(cls, problem: ValueError, length: str = "") -> ApiError:
        """Return the refusal of bad input; the field is read from the message, where it begins with one."""
        text = as_written(problem, length)
        found = _SETTING.match(text)
        return cls(400, text, param=found[1] if found else None)

    def body(self) -> dict[str, Any]:
        """Return the response's content."""
        kind = _KINDS.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_written(problem: ValueError, length: str = "") -> str:
    """Return a message that names fields as the client does, not settings; ``length`` is its name for max_tokens."""
    return _NAMED.sub(lambda at: at[1] + (length if length and at[2] == "max_tokens" else at[2]), str(problem))


def stalled(seconds: float) -> ApiError:
    """Return the error of requests whose world has said nothing for so long."""
    return ApiError(503, f"no step has ended for {seconds:.0f} s", code="stalled", retry_after_s=30)


def gone() -> ApiError:
    """Return the error of requests whose world has ended."""
    return ApiError(503, "the model's ranks have ended; the server is going down", code="world_lost")
