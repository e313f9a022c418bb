"""Settings of the gateway, from the environment (prefix ``OPENSET_``)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from openset.image_headers import MAX_IMAGE_BYTES, MAX_PIXELS

Scope = Literal["predict", "calibrate"]

_FORM_OVERHEAD = 16_384  # bytes of boundaries and part headers, an image


class ApiKey(BaseModel):
    """A key is stored as the SHA-256 of its text; two active keys allow a rotation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = ("predict",)


class Settings(BaseSettings):
    """Everything the gateway can be told.

    Attributes:
        archive: the ``.mar`` that TorchServe serves; model card and calibration scores are read from it.
        model: its name in TorchServe; default: the archive's stem.
        inference_socket: Unix socket of TorchServe's inference address.
        database_url: SQLAlchemy URL of the store; SQLite file or PostgreSQL (postgresql+psycopg://...).
        max_image_bytes: largest upload; TorchServe, which takes no larger one, bounds it.
        max_pixels: largest image; the handler, which decodes no larger one, bounds it.
        max_batch_images: images of one ``/predict/batch`` request.
        max_batch_bytes: all of its images together.
        read_timeout_s: time to receive a body.
        deadline_s: time for TorchServe to answer; what would take longer is refused before.
        store_timeout_s: time for the store to answer.
        max_in_flight: images being worked on, whatever the deadline would allow; bounds the connections to TorchServe.
        max_bytes_in_flight: uploads being read or worked on, together; bounds the memory, which is up to three times this
            while forms are taken apart.
        ready_seconds: a prediction this recent proves readiness without a canary.
        api_keys: none leaves the gateway open.
        request_fpr: whether a prediction may ask for a rate of its own, "allow" or "refuse".
        allowed_hosts: names beside localhost under which a browser may change the threshold while there are no keys.
        log_level: of the JSON log.
    """

    model_config = SettingsConfigDict(env_prefix="OPENSET_", frozen=True, extra="ignore")

    archive: Path
    model: str = ""
    inference_socket: Path
    database_url: str = "sqlite:///openset.db"
    max_image_bytes: int = Field(default=MAX_IMAGE_BYTES, gt=0, le=MAX_IMAGE_BYTES)
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, le=MAX_PIXELS)
    max_batch_images: int = Field(default=32, gt=0)
    max_batch_bytes: int = Field(default=64 * 1024 * 1024, gt=0)
    read_timeout_s: float = Field(default=10.0, gt=0)
    deadline_s: float = Field(default=10.0, gt=0)
    store_timeout_s: float = Field(default=3.0, gt=0)
    max_in_flight: int = Field(default=1024, gt=0)
    max_bytes_in_flight: int = Field(default=192 * 1024 * 1024, gt=0)
    ready_seconds: float = Field(default=5.0, ge=0)
    api_keys: tuple[ApiKey, ...] = ()
    request_fpr: Literal["allow", "refuse"] = "allow"
    allowed_hosts: tuple[str, ...] = ()
    log_level: str = "INFO"

    @field_validator("archive")
    @classmethod
    def _archive_exists(cls, value: Path) -> Path:
        if not value.is_file():
            raise ValueError(
                f"OPENSET_ARCHIVE={value} does not exist; make one with: make archive RUN=<run>"
            )
        return value

    @model_validator(mode="after")
    def _largest_request_fits(self) -> Settings:
        largest = max(self.max_form_bytes(1), self.max_form_bytes(self.max_batch_images))
        if largest > self.max_bytes_in_flight:
            raise ValueError(
                f"OPENSET_MAX_BYTES_IN_FLIGHT={self.max_bytes_in_flight} is less than the largest request, {largest} bytes; "
                "raise it or lower OPENSET_MAX_IMAGE_BYTES and OPENSET_MAX_BATCH_BYTES"
            )
        return self

    @property
    def model_name(self) -> str:
        """Name of the model in TorchServe."""
        return self.model or self.archive.stem

    def max_form_bytes(self, images: int) -> int:
        """Largest multipart body with this many images."""
        one = self.max_image_bytes + _FORM_OVERHEAD
        return one if images == 1 else min(images * one, self.max_batch_bytes)
