"""How the server answers: its name, who may ask, how much, how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..checks import check_at_least, one_line
from ..request import MAX_URGENCY

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEY_VARIABLE = "HELIX_API_KEY"


@dataclass(kw_only=True, slots=True)
class ServingConfig:
    """What the HTTP server allows.

    Attributes:
        model_name: the model's name for clients; null is the last part of model.path.
        api_key_file: a file whose first line is the key that clients must send; HELIX_API_KEY is the other way.
        open_paths: paths that need no key, beside /health.
        allow_anonymous: serve beyond this machine without a key.
        max_body_bytes: of a request's body.
        max_prompts: prompts in one request.
        max_choices: answers to one request, over all its prompts.
        max_live: answers that wait or are made at once; more get 429.
        max_live_tokens: tokens of their prompts, all together; a prompt that is alone may have more.
        max_connections: open sockets; null is what the process may open, less 64.
        max_priority: the highest priority that a request may ask for; null takes 0 alone.
        max_retention_s: the longest retention that it may ask for, in seconds; 0 takes none.
        receive_timeout_s: how long a client may take to send a request.
        send_timeout_s: how long a client may leave what was sent to it unread.
        template_timeout_s: how long a chat template may run.
        keepalive_s: a stream that has nothing to say for so long gets a comment line.
        drain_timeout_s: how long answers may go on after SIGTERM.
        stall_timeout_s: how long the ranks may say nothing, a step included, before requests end with an error.
        kv_events: where what is cached is told over ZMQ as vLLM tells it, tcp://HOST:PORT or ipc://PATH; null: nowhere.
        kv_events_replay: where those ask who missed some of it.
        kv_events_topic: of these messages.
        response_template: a file with the response template of the model, where its tokenizer has none: how tool calls
            and reasoning are told apart.
    """

    model_name: str | None = None
    api_key_file: str | None = None
    open_paths: list[str] = field(default_factory=list)
    allow_anonymous: bool = False
    max_body_bytes: int = 64 << 20
    max_prompts: int = 128
    max_choices: int = 128
    max_live: int = 1024
    max_live_tokens: int = 1 << 24
    max_connections: int | None = None
    max_priority: int | None = None
    max_retention_s: float = 0.0
    receive_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    template_timeout_s: float = 5.0
    keepalive_s: float = 10.0
    drain_timeout_s: float = 25.0
    stall_timeout_s: float = 120.0
    kv_events: str | None = None
    kv_events_replay: str | None = None
    kv_events_topic: str = ""
    response_template: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_prompts", "max_choices", "max_live", "max_live_tokens"):
            check_at_least(f"serve.{name}", getattr(self, name), 1)
        if self.max_connections is not None:
            check_at_least("serve.max_connections", self.max_connections, 1)
        for name in ("receive_timeout_s", "send_timeout_s", "template_timeout_s", "keepalive_s"):
            check_at_least(f"serve.{name}", getattr(self, name), 0.01)
        check_at_least("serve.drain_timeout_s", self.drain_timeout_s, 0)
        check_at_least("serve.stall_timeout_s", self.stall_timeout_s, 2)  # idle ranks say something every second
        check_at_least("serve.max_retention_s", self.max_retention_s, 0)
        if self.kv_events is None and self.kv_events_replay is not None:
            raise ValueError(f"serve.kv_events_replay = {self.kv_events_replay} needs serve.kv_events")
        for name in ("kv_events", "kv_events_replay"):
            self._check_endpoint(f"serve.{name}", getattr(self, name))
        if self.max_priority is not None and not abs(self.max_priority) <= MAX_URGENCY:
            raise ValueError(f"serve.max_priority = {self.max_priority} must lie in {-MAX_URGENCY}..{MAX_URGENCY}")

    def _check_endpoint(self, name: str, endpoint: str | None) -> None:
        if endpoint is None or endpoint.startswith("ipc://"):
            return
        kind, _, address = endpoint.partition("://")
        host, _, port = address.rpartition(":")
        if kind != "tcp" or not (host and (port.isdecimal() or port == "*")):
            raise ValueError(f"{name} = {endpoint} must be tcp://HOST:PORT or ipc://PATH")
        if host.strip("[]") not in LOOPBACK and not self.allow_anonymous:
            raise ValueError(
                f"{name} = {endpoint} tells other machines the tokens of prompts without a key; set "
                "serve.allow_anonymous=true, or use 127.0.0.1"
            )

    def key(self, variable: str | None) -> str | None:
        """Return the key that clients must send: the file's, or what HELIX_API_KEY holds; None asks for none.

        Raises:
            ValueError: where both are given, the file cannot be read, or the key is empty or no printable ASCII.
        """
        if self.api_key_file is None:
            return None if variable is None else _checked(variable, KEY_VARIABLE)
        name = f"serve.api_key_file = {self.api_key_file}"
        if variable is not None:
            raise ValueError(f"{name} and {KEY_VARIABLE} are both set; keep one of them")
        try:
            text = Path(self.api_key_file).expanduser().read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{name} cannot be read: {one_line(error)}") from error
        return _checked(text.partition("\n")[0].strip(), name)

    def require_key(self, host: str, key: str | None) -> None:
        """Raise ValueError where the server would be open to other machines without a key."""
        if key is None and host not in LOOPBACK and not self.allow_anonymous:
            raise ValueError(
                f"host = {host} serves other machines without a key; set {KEY_VARIABLE} or serve.api_key_file, "
                "or serve.allow_anonymous=true"
            )


def _checked(key: str, where: str) -> str:
    if not key or not all(" " < letter <= "~" for letter in key):
        raise ValueError(f"{where} holds no key: one line of printable ASCII without spaces")
    return key
