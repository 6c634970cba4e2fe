"""The base of a record's classes."""

from pydantic import BaseModel, ConfigDict


class RecordModel(BaseModel):
    """A part of a record: immutable, and without fields that are not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True)
