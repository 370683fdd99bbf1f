"""Limit the large bodies of one process: their number, and their bytes in the temporary folder."""

import shutil
import tempfile
import uuid

import structlog

from app.live.capacity import Capacity, Holding
from app.problems import UploadsExhausted
from edges import telemetry
from settings import GatewaySettings

log = structlog.get_logger(__name__)

RETRY_AFTER_S = 2


class UploadRoom:
    """The places and the disk space for large bodies, shared among tenants."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.largest_bytes = max(
            settings.max_upload_bytes, settings.max_job_body_bytes, settings.max_batch_bytes
        )
        self._bodies = Capacity(settings.max_uploads, telemetry.UPLOADS)
        free = shutil.disk_usage(tempfile.gettempdir()).free
        room = settings.upload_spool_bytes or free * 4 // 5 // settings.web_concurrency
        if room < self.largest_bytes:
            log.warning(
                "upload_spool_too_small",
                free_bytes=free,
                room_bytes=room,
                largest_bytes=self.largest_bytes,
            )
        # At least one upload of the largest size is always admitted.
        self._spool = Capacity(max(room, self.largest_bytes), telemetry.SPOOLED_BYTES)

    def take_body(self, tenant_id: uuid.UUID) -> Holding:
        """Reserve a place for one more large body. Raises UploadsExhausted."""
        return _taken(self._bodies, tenant_id, 1, "no place for another large upload")

    def take_spool(self, tenant_id: uuid.UUID, size_bytes: int) -> Holding:
        """Reserve bytes of the temporary folder. Raises UploadsExhausted."""
        return _taken(self._spool, tenant_id, size_bytes, "no room for another upload of this size")


def _taken(capacity: Capacity, tenant_id: uuid.UUID, amount: int, what: str) -> Holding:
    holding = capacity.take(tenant_id, amount)
    if holding is None:
        telemetry.SHED.labels("uploads_exhausted").inc()
        whose = f"; of {capacity.most}, your tenant holds {capacity.held_by(tenant_id)}"
        raise UploadsExhausted(
            f"This gateway process has {what}{whose}.", retry_after_s=RETRY_AFTER_S
        )
    return holding
