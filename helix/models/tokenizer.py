"""Loading a checkpoint's tokenizer, from local files only and without running any code that comes with it."""

import json
import logging
from pathlib import Path
from typing import Any

from ..checks import one_line
from .weight_files import is_lfs_pointer

_log = logging.getLogger(__name__)

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load_tokenizer(path: str | Path) -> Any:
    """Return the transformers tokenizer at `path`, a checkpoint folder or a file in it; None if the folder has none.

    A folder without one is what a run on dummy weights has: prompts are then token ids. Raises ValueError, in one line,
    when tokenizer files are there but do not load. A tokenizer that is code in the checkpoint, such as Kimi-K2's, is
    logged and counts as none.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    if not any((folder / name).is_file() for name in FILES):
        return None
    if _is_code(folder):
        _log.info("model.path = %s: its tokenizer is code, which is not run: prompts have to be token ids", path)
        return None
    if pointer := next((name for name in FILES if is_lfs_pointer(folder / name)), None):
        raise ValueError(f"model.path = {path}: {pointer} is a git-lfs pointer; run git lfs pull in its folder")
    if _is_bare(folder):
        raise ValueError(
            f"model.path = {path}: tokenizer.model alone does not say how text is prepared for it, and a wrong guess "
            f"gives other ids; add the model's tokenizer_config.json with its tokenizer_class, or tokenizer.json"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the parsers raise: JSON, SentencePiece and Rust errors share no type
        raise ValueError(f"model.path = {path}: its tokenizer does not load: {one_line(error)}") from error


def end_of_turn_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the special token that a chat template writes behind an answer, if it writes one there.

    Some models name it nowhere else: their end token is that of a document, and answers would go on as another turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    answer = "the answer"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # the model's own program, which may want other turns
        _log.info("the chat template does not tell how an answer ends: %s", one_line(error))
        return ()
    rest = text.rpartition(answer)[2].lstrip()
    tokens = [(len(token.content), number) for number, token in tokenizer.added_tokens_decoder.items()
              if token.special and rest.startswith(token.content)]  # fmt: skip
    return (max(tokens)[1],) if tokens else ()


def _is_code(folder: Path) -> bool:
    """Return whether only code in the checkpoint's folder makes its tokenizer."""
    settings = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() or not settings.is_file():
        return False
    try:
        return "AutoTokenizer" in (json.loads(settings.read_text("utf-8")).get("auto_map") or {})
    except (OSError, ValueError, AttributeError):
        return False  # transformers says what is wrong with it


def _is_bare(folder: Path) -> bool:
    """Return whether a SentencePiece model is there without the class that would read it: transformers guesses one."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return False
    try:
        return not json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return True
