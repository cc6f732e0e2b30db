"""The error that leads to a solve without a recording."""


class NotRecordableError(Exception):
    """Why a solve cannot be recorded."""
