"""The base of everything that is read from JSON files and checked."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Immutable, and without fields that are not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True)
