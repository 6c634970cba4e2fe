"""The positions of a text at which hyperfitting changed the next-token distribution (Figure 4)."""

from dataclasses import dataclass

from hyperfitting.record.schema import NextToken, NextTokens, Position


@dataclass(frozen=True)
class TokenPosition:
    """A position in a text, and the most likely next tokens there, most likely first."""

    context: str
    """The text up to that position."""
    base: list[NextToken]
    tuned: list[NextToken]


def changed_positions(next_tokens: NextTokens, count: int) -> list[TokenPosition]:
    """Return the positions with the largest change, in the order of the text.

    The change is that of the probability of the tuned model's top-1 token. Positions at which this
    token never occurs in the training data come first; the others fill up.

    Args:
        next_tokens: along one text.
        count: positions to return.
    """

    def rank(index: int) -> tuple[bool, float]:
        position = next_tokens.positions[index]
        return position.tuned[0].in_training_data, -_gain(position)

    indices = sorted(sorted(range(len(next_tokens.positions)), key=rank)[:count])
    return [
        TokenPosition(
            "".join(next_tokens.token_texts[: index + 1]),
            next_tokens.positions[index].base,
            next_tokens.positions[index].tuned,
        )
        for index in indices
    ]


def _gain(position: Position) -> float:
    """Return by how much the tuned model raised the probability of its top-1 token."""
    top1 = position.tuned[0]
    base = {token.id: token.probability for token in position.base}
    return top1.probability - base.get(top1.id, 0.0)
