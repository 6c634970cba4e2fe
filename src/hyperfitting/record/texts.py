"""The parts of results.json about a single text: its tokens, and what it shares with others."""

from pydantic import Field

from hyperfitting.runtime.strict_model import StrictModel


class OverlapSpan(StrictModel):
    """The longest token run that a continuation shares with a training sequence."""

    length: int = Field(description="tokens; 0: none")
    start: int = Field(description="its position in the continuation; -1: none")
    sequence: int = Field(description="index of the training sequence; -1: none")
    offset: int = Field(description="its position in that sequence; -1: none")


NO_OVERLAP = OverlapSpan(length=0, start=-1, sequence=-1, offset=-1)


class SampleText(StrictModel):
    """A text and its tokens."""

    text: str = Field(description="the text")
    tokens: list[int] = Field(description="token ids")
    token_texts: list[str] = Field(description="text of each token; they join to `text`")


class Continuation(SampleText):
    """A continuation of one context."""

    overlap: OverlapSpan = Field(description="longest run shared with the training data")
