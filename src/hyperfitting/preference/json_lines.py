"""Reading JSON lines, each checked as an instance of a model."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from hyperfitting.errors import UserError
from hyperfitting.runtime.files import first_problem

Model = TypeVar("Model", bound=BaseModel)


def parse_lines(content: bytes, model: type[Model], name: str, path: Path) -> list[Model]:
    """Return the objects of JSON lines.

    Args:
        content: whole lines.
        model: of each line.
        name: of an object, for messages.
        path: that the lines were read from, for messages.

    Raises:
        UserError: a line is invalid; the message gives its number and the field.
    """
    parsed = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            parsed.append(model.model_validate_json(line))
        except ValidationError as error:
            raise UserError(
                f"line {number} is no {name}: {first_problem(error)}",
                field=f"{name}s",
                value=path,
                hint="correct or remove this line",
            ) from error
    return parsed
