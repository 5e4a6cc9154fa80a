"""Where the files lie that describe a model: in its own folder, unless flags name others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ..runtime.errors import StartupError
from .config import ModelConfig

GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class ModelPaths:
    """Three folders. `tokenizer`, `generation`: None where they are the model's own."""

    model: Path
    tokenizer: Path | None = None
    generation: Path | None = None

    @classmethod
    def given(cls, model: str, tokenizer: str, generation_config: str) -> ModelPaths:
        """As flags name them; vLLM's words ``auto`` and ``vllm`` of `generation_config` name no folder, nor
        does an empty `tokenizer`. Raises StartupError for one that is not there."""
        path = Path(model).expanduser()
        if not path.is_dir():
            raise StartupError(
                f"no model at {model}: a folder in Hugging Face format is expected, or OWNER/NAME on the hub"
            )
        other_tokenizer = Path(tokenizer).expanduser() if tokenizer else None
        if other_tokenizer is not None and not (other_tokenizer / "tokenizer.json").is_file():
            raise StartupError(f"--tokenizer {tokenizer}: a folder with a tokenizer.json is expected")
        generation = None if generation_config in ("auto", "vllm") else Path(generation_config).expanduser()
        if generation is not None and not (generation / GENERATION_FILE).is_file():
            expected = f"auto, vllm or a folder with a {GENERATION_FILE}"
            raise StartupError(f"--generation-config {generation_config}: {expected} is expected")
        return cls(path, other_tokenizer, generation)

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer or self.model

    @property
    def generation_folder(self) -> Path:
        return self.generation or self.model

    def with_model(self, model: Path) -> ModelPaths:
        """Of another checkpoint; what flags named counts on."""
        return replace(self, model=model)

    def read_config(self) -> ModelConfig:
        """Raises StartupError."""
        return ModelConfig.from_dir(self.model, self.tokenizer, self.generation)

    def text_digests(self) -> dict[str, str]:
        """Of the files that say how text becomes a prompt and how tokens are drawn by default: name → 32 hex
        digits. One that is not there has none."""
        files = [
            *(self.tokenizer_folder / name for name in _TOKENIZER_FILES),
            self.generation_folder / GENERATION_FILE,
        ]
        return {file.name: _digest(file) for file in files if file.is_file()}


def _digest(file: Path) -> str:
    """Of JSON: of what it says, however it is written. A file that cannot be read has one of its own."""
    try:
        content = file.read_bytes()
        if file.suffix == ".json":
            content = msgspec.json.encode(msgspec.json.decode(content), order="sorted")
    except OSError as error:
        content = str(error).encode()
    except (msgspec.DecodeError, RecursionError):
        pass  # as it is written, then; who needs what it says tells what is wrong
    return hashlib.blake2b(content, digest_size=16).hexdigest()
