"""The part of results.json on the classes of completed images."""

from pydantic import Field

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.runtime.strict_model import StrictModel


class Recognition(StrictModel):
    """Classes that a classifier predicts for complete images, in the order of the samples."""

    n_train: int = Field(
        description="real images that it was trained on, none of them tuned on or evaluated"
    )
    accuracy: Estimate = Field(description="on other real images, also none of those")
    context_accuracy: Estimate = Field(
        description="of the same kind of classifier on the contexts alone, of the true images"
    )
    true: list[int] = Field(description="class of the true image")
    tuned: list[int] = Field(description="class predicted for the tuned model's")
    base: list[int] = Field(description="for the base model's")
    reference: list[int] = Field(description="for the true image")
