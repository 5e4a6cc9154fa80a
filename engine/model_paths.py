"""Where the files lie that describe a model: in its own folder, unless flags name others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..runtime.errors import StartupError
from .model_config import ModelConfig

GENERATION_FILE = "generation_config.json"


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
