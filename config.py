"""Every switch of the project: read from the environment once, here only, into frozen parts.

A component is handed the part it needs and never the whole. Nothing is written back: what a device
decides at start-up stands in `BackendSpec`. Each field names its flag; `docs/configuration.md`
lists them all.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class ConfigError(ValueError):
    """A flag has a value that nothing here understands.

    The message is one line that names the flag.
    """


class FlagSource(PydanticBaseSettingsSource):
    """The environment, asked for flags alone: a stray variable called `device` is not a switch.

    An empty flag is unset.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        flag = field.alias or ""
        return os.environ.get(flag) or None, flag, False

    def __call__(self) -> dict[str, Any]:
        found = (
            self.get_field_value(field, name)
            for name, field in self.settings_cls.model_fields.items()
        )
        return {flag: value for value, flag, _ in found if value is not None}


class Part(BaseSettings):
    """A frozen group of switches.

    In code a field is set by its own name, in the environment by its flag.
    """

    model_config = SettingsConfigDict(
        frozen=True, populate_by_name=True, extra="forbid", protected_namespaces=()
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments first, then the environment; no files."""
        return init_settings, FlagSource(settings_cls)


class ModelSettings(Part):
    """Which model, from where, in which form."""

    name: str = Field("rd211/Qwen3-0.6B-Instruct", alias="MODEL_NAME")
    local_dir: str | None = Field(None, alias="MODEL_LOCAL_DIR")  # wins over `name`
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = Field(
        "auto", alias="LOAD_FORMAT"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", alias="DTYPE")
    trust_remote_code: bool = Field(False, alias="TRUST_REMOTE_CODE")
    max_model_len: int = Field(0, ge=0, alias="MAX_MODEL_LEN")  # tokens; 0: the model's own context

    @property
    def served_name(self) -> str:
        """What the model is called by its users."""
        return os.path.basename(os.path.normpath(self.local_dir)) if self.local_dir else self.name


class DeviceSettings(Part):
    """Where the model runs and by which kernels."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", alias="DEVICE")
    attention: Literal["auto", "sdpa", "triton", "flash", "flashinfer", "sgl_kernel"] = Field(
        "auto", alias="ATTN_IMPL"
    )
    flash: bool = Field(True, alias="ENABLE_FLASH_ATTENTION")  # may `auto` take flash-attn
    cuda_graph: bool = Field(True, alias="ENABLE_CUDA_GRAPH")  # steps by CUDA graphs
    compile_model: bool = Field(False, alias="COMPILE_MODEL")  # torch.compile between products
    tensor_parallel: int = Field(
        1, ge=1, le=64, alias="TENSOR_PARALLEL_SIZE"
    )  # devices that share each layer of one engine
    deterministic: bool = Field(False, alias="DETERMINISTIC")  # bits free of company
    memory_fraction: float = Field(
        0.9, gt=0, le=1, alias="MEMORY_FRACTION"
    )  # of the device's memory


class CacheSettings(Part):
    """Pages of the KV cache."""

    page_tokens: int = Field(16, ge=1, le=256, alias="PAGE_SIZE_TOKENS")  # tokens in a page
    budget_tokens: int = Field(
        0, ge=0, le=1 << 28, alias="PAGE_TOKEN_BUDGET"
    )  # capacity in tokens; 0: measured from free memory
    prefix: bool = Field(True, alias="PREFIX_CACHE")  # keep finished prefixes for reuse


class BatchSettings(Part):
    """How much is computed at once. 0: what suits the device, see `resolve_limits`."""

    max_running: int = Field(0, ge=0, le=4096, alias="MAX_RUNNING")  # rows of a batch
    max_step_tokens: int = Field(
        0, ge=0, le=1 << 20, alias="MAX_STEP_TOKENS"
    )  # token budget of a step


def resolve_limits(batch: BatchSettings, device: str) -> BatchSettings:
    """`batch` without zeros: 64 rows and 512 tokens, on a CUDA device 256 and 8,192."""
    rows, tokens = (256, 8192) if device == "cuda" else (64, 512)
    return BatchSettings(
        max_running=batch.max_running or rows, max_step_tokens=batch.max_step_tokens or tokens
    )


class FakeSettings(Part):
    """The rehearsal backend: how long its steps take and when they fail."""

    step_ms: float = Field(0.0, ge=0, alias="FAKE_STEP_MS")  # milliseconds a step takes
    token_us: float = Field(
        0.0, ge=0, alias="FAKE_TOKEN_US"
    )  # microseconds more for each token of the step
    fail_at_step: int = Field(
        0, ge=0, alias="FAKE_FAIL_AT_STEP"
    )  # the device is lost at this step; 0: never
    depth: int = Field(1, ge=1, le=8, alias="FAKE_DEPTH")  # steps in flight


class BackendSettings(Part):
    """All that a backend's opener is handed."""

    impl: Literal["auto", "hf", "sglang", "mlx", "fake"] = Field("auto", alias="BACKEND_IMPL")
    model: ModelSettings = Field(default_factory=ModelSettings)
    device: DeviceSettings = Field(default_factory=DeviceSettings)
    cache: CacheSettings = Field(default_factory=CacheSettings)
    batch: BatchSettings = Field(default_factory=BatchSettings)
    fake: FakeSettings = Field(default_factory=FakeSettings)


class QueueSettings(Part):
    """Who may wait."""

    max_queued: int = Field(0, ge=0, alias="MAX_QUEUED")  # requests that may wait; 0: no bound


class GenerationSettings(Part):
    """What an answer gets that asks for nothing."""

    max_new_tokens: int = Field(512, ge=1, alias="MAX_NEW_TOKENS_DEFAULT")


class PoolSettings(Part):
    """How many engines, and which of them a request goes to."""

    replicas: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = Field("auto", alias="REPLICAS")
    multi_device: bool = Field(True, alias="ENABLE_MULTI_DEVICE")  # auto: one a CUDA device
    mode: Literal["rr", "fsfs", "random", "cache_aware"] = Field("rr", alias="SCHEDULER_MODE")
    max_inflight_total: int = Field(
        0, ge=0, alias="MAX_INFLIGHT_TOTAL"
    )  # requests given to engines; 0: what they have rows for
    max_inflight_per_engine: int = Field(0, ge=0, alias="MAX_INFLIGHT_PER_ENGINE")  # likewise


class AdaptiveSettings(Part):
    """Shorter answers under load."""

    enabled: bool = Field(False, alias="ADAPTIVE_MAX_NEW_TOKENS")
    threshold: int = Field(
        0, ge=0, alias="ADAPTIVE_MAX_INFLIGHT_THRESHOLD"
    )  # live requests beyond which it acts; 0: the rows of all engines
    factor: float = Field(0.8, gt=0, le=1, alias="ADAPTIVE_MAX_NEW_TOKENS_FACTOR")


class DialectSettings(Part):
    """How the model writes what is more than words. auto: as its chat template has it."""

    tool_parser: Literal[
        "auto", "hermes", "qwen3_coder", "llama3_json", "mistral", "pythonic", "none"
    ] = Field("auto", alias="TOOL_PARSER")
    reasoning_parser: Literal["auto", "think", "none"] = Field("auto", alias="REASONING_PARSER")


class ServerSettings(Part):
    """What clients see, and who they must be."""

    alias: str | None = Field(None, alias="MODEL_ALIAS")  # shown instead of the model's name
    api_key: SecretStr | None = Field(None, alias="API_KEY")  # several: separated by commas
    admin_api_key: SecretStr | None = Field(None, alias="ADMIN_API_KEY")  # unset: loopback only
    strict_fields: bool = Field(False, alias="STRICT_FIELDS")  # refuse unknown fields everywhere
    drain_timeout_s: float = Field(30.0, ge=0, alias="DRAIN_TIMEOUT_S")
    warm_prefixes: str | None = Field(None, alias="WARM_PREFIXES")  # separated by ||
    metric_window: int = Field(
        50, ge=1, le=100_000, alias="METRIC_WINDOW"
    )  # requests that a rolling average is over


class ControlSettings(Part):
    """The control plane's socket."""

    enabled: bool = Field(False, alias="ZMQ_CONTROL")
    endpoint: str = Field("tcp://127.0.0.1:5557", alias="ZMQ_CONTROL_ENDPOINT")


class Settings(Part):
    """The whole, for the entry points: they hand its parts down."""

    backend: BackendSettings = Field(default_factory=BackendSettings)
    queue: QueueSettings = Field(default_factory=QueueSettings)
    generation: GenerationSettings = Field(default_factory=GenerationSettings)
    pool: PoolSettings = Field(default_factory=PoolSettings)
    adaptive: AdaptiveSettings = Field(default_factory=AdaptiveSettings)
    dialect: DialectSettings = Field(default_factory=DialectSettings)
    server: ServerSettings = Field(default_factory=ServerSettings)
    control: ControlSettings = Field(default_factory=ControlSettings)
    log_level: LogLevel = Field("INFO", alias="LOG_LEVEL")


def read_settings() -> Settings:
    """The settings of this process.

    Raises ConfigError with one line for each flag that is wrong.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigError(_explain(error.errors())) from None


def _explain(details: list[ErrorDetails]) -> str:
    """One line. A value that may be one thing or another is told what it could be."""
    wrong: dict[str, list[str]] = {}
    for detail in details:
        wrong.setdefault(f"{detail['loc'][0]}={detail['input']}", []).append(detail["msg"])
    return "; ".join(f"{flag}: {' or '.join(what)}" for flag, what in wrong.items())


# How long a thread of the CPU kernels spins at a barrier before it sleeps. By default that is
# milliseconds: two threads on one core, as soon as another process wants the other, then wait for
# each other at every operation, and a step takes tens of times as long.
OPENMP_SPINS = "10000"


def calm_openmp() -> None:
    """Bound how long OpenMP threads spin, unless GOMP_SPINCOUNT is set. Before torch is loaded."""
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)


def get_device() -> str:
    """The best device of this machine: "mps", "cuda" or "cpu", looked for in that order."""
    import torch  # here, because everything else in this module must load without it

    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"
