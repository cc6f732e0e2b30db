"""Records of settings, in words."""

from dataclasses import fields
from typing import Any


class Record:
    """A dataclass that shows a field with ``repr=False`` only where it is not the default.

    So what most users never set stays out of sight, and ``eval`` of the words still gives the record.
    """

    def __repr__(self) -> str:
        record: Any = self
        values = ((field, getattr(self, field.name)) for field in fields(record))
        shown = (f"{field.name}={value!r}" for field, value in values if field.repr or value != field.default)
        return f"{type(self).__name__}({', '.join(shown)})"
