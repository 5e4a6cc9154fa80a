"""Names of models on a hub, such as ``Qwen/Qwen3-0.6B``: which they are, and the folder that holds the files.

The cache, its place, tokens, proxies and the offline mode are huggingface_hub's own: ``HF_HOME``,
``HF_HUB_CACHE``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .errors import StartupError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
# What a router reads; a node reads the weights too.
_DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
_PASSED_OVER = ("*/*", "consolidated*")  # other runtimes' copies of the same weights


def is_hub_name(model: str) -> bool:
    """Whether `model` is an owner and a name, and no path of a file or folder that is there."""
    return _NAME.fullmatch(model) is not None and not Path(model).exists()


class ModelFolders:
    """Where models lie, each looked up once: a name means the same files to all who ask."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], str] = {}

    def find(self, model: str, *, revision: str, cache_dir: str, with_weights: bool) -> str:
        """`model` itself, or the folder of the files of a hub's model, fetched where they are not in the
        cache. Empty `revision` and `cache_dir` are huggingface_hub's own. Raises StartupError, one line."""
        if not is_hub_name(model):
            return model
        key = (model, revision, cache_dir)
        if key not in self._found:
            self._found[key] = download(model, revision, cache_dir, with_weights=with_weights)
        return self._found[key]


def download(name: str, revision: str, cache_dir: str, *, with_weights: bool) -> str:
    """The folder of config and tokenizer and, with `with_weights`, safetensors: from the cache, or fetched
    with a progress bar on a terminal. Raises StartupError, one line."""
    # A third of a second, and not needed where the model is a folder.
    from huggingface_hub import snapshot_download

    patterns = [*_DESCRIPTION_FILES, *(_WEIGHT_FILES if with_weights else ())]
    return _in_one_line(
        name,
        revision,
        lambda: snapshot_download(
            name,
            revision=revision or None,
            cache_dir=Path(cache_dir).expanduser() if cache_dir else None,
            allow_patterns=patterns,
            ignore_patterns=list(_PASSED_OVER),
        ),
    )


def _in_one_line(name: str, revision: str, fetch: Callable[[], str]) -> str:
    # HTTPError is its HTTP client's, for a connection that breaks or a proxy that refuses.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return fetch()
    except GatedRepoError as error:
        mend = "its owner has to let you in; set HF_TOKEN to a token that may"
        raise StartupError(f"{name}: {mend}") from error
    except RevisionNotFoundError as error:
        raise StartupError(f"{name}: the hub has no revision {revision!r} of it") from error
    except RepositoryNotFoundError as error:
        raise StartupError(
            f"no model at {name}: no such folder here, and none of that name on the hub (or HF_TOKEN may not "
            "see it)"
        ) from error
    except LocalEntryNotFoundError as error:  # offline, asked for or not, or a hub that is down
        of = f" at revision {revision}" if revision else ""
        raise StartupError(
            f"no model at {name}: no such folder here, not whole in the hub's cache{of}, and the hub cannot "
            "be reached; name a checkpoint's folder, or a model that is in the cache"
        ) from error
    except (HTTPError, OSError, ValueError) as error:  # another answer of the hub, a full disk, an odd name
        raise StartupError(f"{name} cannot be fetched: {' '.join(str(error).split())}") from error
