"""The part of results.json on what a classifier sees in completed images."""

from pydantic import Field

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.runtime.strict_model import StrictModel


class Recognition(StrictModel):
    """Classes that a classifier sees in complete images, in the order of the samples."""

    n_train: int = Field(
        description="real images that it was trained on, none of them tuned on or evaluated"
    )
    accuracy: Estimate = Field(description="on other real images, also none of those")
    context_accuracy: Estimate = Field(
        description="of the same kind of classifier that sees only the context, on the true images"
    )
    true: list[int] = Field(description="class of the true image")
    tuned: list[int] = Field(description="class seen in the tuned model's")
    base: list[int] = Field(description="in the base model's")
    reference: list[int] = Field(description="in the true image")
