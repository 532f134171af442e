"""Models of the Hugging Face hub: from its client's cache, else fetched.

A GGUF is `owner/repository` where the repository holds one, or `owner/repository/file.gguf`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backend.hf.loading.folder import CONFIG, is_complete, weight_files
from backend.interface import ModelNotFound, StartFailed, Unsupported, first_line
from config import ModelSettings

HUB_TIMEOUT_S = 2.0  # to answer whether the model exists; asked twice
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
HUB_WEIGHTS = ["*.safetensors"]
HUB_CODE = ["*.py"]  # only with TRUST_REMOTE_CODE=1
HUB_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights
GGUF = ".gguf"
ADVICE = (
    "set MODEL_LOCAL_DIR to a model folder or a .gguf file "
    "(`make model` writes one to models/smollm2-135m-instruct)"
)


def fetch(settings: ModelSettings) -> Path:
    """The folder or .gguf file of a hub model, fetched if the hub's cache does not hold it whole.

    Raises ModelNotFound, or Unsupported when LOAD_FORMAT contradicts the name.
    """
    model = HubModel.named_by(settings)
    try:
        return model.cached() or model.download()
    except StartFailed:
        raise
    except Exception as error:  # whatever its HTTP library raises: the model cannot be had
        raise ModelNotFound(
            f"MODEL_NAME={settings.name} is no local path, is not in the hub's cache, and the hub "
            f"does not give it ({first_line(error)}): {ADVICE}"
        ) from error


@dataclass(frozen=True, slots=True)
class HubModel:
    """What is wanted of a repository."""

    repository: str
    file: str | None  # the .gguf that was named
    settings: ModelSettings

    @classmethod
    def named_by(cls, settings: ModelSettings) -> HubModel:
        """Raises Unsupported for a .gguf file under another LOAD_FORMAT."""
        parts = settings.name.split("/")
        if len(parts) < 3 or not settings.name.endswith(GGUF):
            return cls(settings.name, None, settings)
        if settings.load_format not in ("auto", "gguf"):
            raise Unsupported(
                f"LOAD_FORMAT={settings.load_format} does not read MODEL_NAME={settings.name}: "
                "use LOAD_FORMAT=auto"
            )
        return cls("/".join(parts[:2]), "/".join(parts[2:]), settings)

    def cached(self) -> Path | None:
        """What the hub's cache holds of it, if that is enough to run."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        with suppress(LocalEntryNotFoundError):
            if self.file is not None:
                return Path(hf_hub_download(self.repository, self.file, local_files_only=True))
            folder = self._snapshot(local=True)
            files = sorted(folder.rglob(f"*{GGUF}"))
            if self._is_gguf([path.name for path in (*weight_files(folder), *files)]):
                return files[0] if len(files) == 1 else None
            made_up = self.settings.load_format == "dummy"
            if is_complete(folder) or (made_up and (folder / CONFIG).is_file()):
                return folder
        return None

    def download(self) -> Path:
        """Raises ModelNotFound when no .gguf can be told from others; all that the hub's client
        raises.
        """
        from huggingface_hub import HfApi, hf_hub_download  # late: half a second

        # asked first, because the download would wait longer
        found = HfApi().model_info(self.repository, timeout=HUB_TIMEOUT_S).siblings or []
        names = sorted(each.rfilename for each in found)
        if self._is_gguf(names):
            file = self._choose([name for name in names if name.endswith(GGUF)])
            return Path(hf_hub_download(self.repository, file))
        return self._snapshot(local=False)

    def _is_gguf(self, names: list[str]) -> bool:
        """Whether the .gguf among the files `names` is meant, and no safetensors."""
        if self.file is not None or self.settings.load_format != "auto":
            return self.file is not None or self.settings.load_format == "gguf"
        kinds = {Path(name).suffix for name in names}
        return GGUF in kinds and ".safetensors" not in kinds

    def _choose(self, files: list[str]) -> str:
        listed = ", ".join(files)
        if self.file is not None:
            if self.file not in files:
                raise ModelNotFound(f"{self.repository} has no {self.file}, it has: {listed}")
            return self.file
        if not files:
            raise ModelNotFound(f"{self.repository} holds no {GGUF} file: {ADVICE}")
        if len(files) > 1:
            raise ModelNotFound(
                f"{self.repository} holds {len(files)} {GGUF} files: choose one as "
                f"MODEL_NAME={self.repository}/{files[0]}; it has: {listed}"
            )
        return files[0]

    def _snapshot(self, local: bool) -> Path:
        from huggingface_hub import snapshot_download

        weights = self.settings.load_format != "dummy"
        code = self.settings.trust_remote_code
        return Path(
            snapshot_download(
                self.repository,
                allow_patterns=[*HUB_FILES, *HUB_WEIGHTS * weights, *HUB_CODE * code],
                ignore_patterns=HUB_IGNORED,
                local_files_only=local,
            )
        )
