"""Errors as replies say them."""

from __future__ import annotations

import logging

from engram._wire import fault_of
from engram.errors import EngramError
from engram.proto.v1 import engram_pb2 as pb

_log = logging.getLogger("engram.service")


def packed(error: Exception, doing: str) -> pb.Error:
    """`error` for a client; one that is a defect of ours goes to the log.

    Args:
        doing: what failed, for the log.
    """
    message = str(error)
    if not isinstance(error, EngramError):
        _log.error("%s failed", doing, exc_info=error)
        message = "the sidecar failed on this request; its log says more"
    return pb.Error(code=fault_of(error).code, message=message)
