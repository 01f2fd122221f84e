"""The server's log: one JSON object a line, without what users write."""

import json
import logging
import sys
from datetime import UTC, datetime

_FIELDS = "fields"
"""Attribute of a record: what is logged beside the message."""


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure() -> None:
    """Write the log to the standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # It warns of each moment in which all threads are busy, which is what they are there for.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


def log(logger: logging.Logger, message: str, **fields: object) -> None:
    """Log a message with fields of its own."""
    logger.info(message, extra={_FIELDS: fields})
