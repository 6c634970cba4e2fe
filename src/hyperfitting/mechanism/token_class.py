"""Classes of tokens: function words, punctuation, names, digits, subword continuations, others.

Decided from the text alone, for English: a rough division, to see which kind of token gains.
"""

from collections.abc import Sequence
from itertools import accumulate

_SENTENCE_END = (".", "!", "?", ":", '"', "”", "\n")
_FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any no every each either neither both all such
    i me my mine myself you your yours yourself he him his himself she her hers herself it its
    itself we us our ours ourselves they them their theirs themselves who whom whose which what one
    and or but nor so yet if because although though while whereas unless until since whether than
    as when where why how
    of in on at by for with from to into onto upon about above below over under between among
    through during before after against within without across behind beyond near toward towards
    off out up down
    am is are was were be been being have has had having do does did doing will would shall should
    can could may might must not there here then also only just very too more most
    """.split()  # noqa: SIM905  (as a text it stays legible)
)
"""Closed-class words of English: determiners, pronouns, conjunctions, prepositions, auxiliaries,
and the commonest particles."""


def token_classes(token_texts: Sequence[str]) -> list[str]:
    """Return the class of each token of a text.

    - `space`: nothing but white space, or an incomplete character.
    - `digits`: begins with a digit.
    - `punctuation`: has neither letter nor digit.
    - `subword`: letters that continue a word, as no white space separates them from a letter.
    - `function`: a word of a closed class, such as "the", "of", "was".
    - `name`: a capitalized word that does not begin a sentence.
    - `other`: any other beginning of a word.

    Args:
        token_texts: the text of each token; they join to the whole.
    """
    after = [*token_texts[1:], ""]
    return list(map(_token_class, token_texts, _texts_before(token_texts), after))


def choice_classes(choices: Sequence[str], token_texts: Sequence[str]) -> list[str]:
    """Return the classes of choices at the last positions of a text, from the text before each.

    The next token is left out, as it follows the choice of one model only: "in" is a function word,
    whether or not the text goes on with "verse".

    Args:
        choices: the text of the token that a model chooses, by position.
        token_texts: of the whole text.
    """
    before = _texts_before(token_texts)[len(token_texts) - len(choices) :]
    return [_token_class(choice, text, "") for choice, text in zip(choices, before, strict=True)]


def _texts_before(token_texts: Sequence[str]) -> list[str]:
    """Return the last characters before each token."""
    ends = accumulate(token_texts, lambda text, token: (text + token)[-8:], initial="")
    return list(ends)[:-1]


def _token_class(token: str, before: str, after: str) -> str:
    word = token.strip()
    continues_word = before[-1:].isalpha() and token[:1].isalpha()
    letters = word.strip("'’\"“”(),.;:-—")
    begins_sentence = not before.strip() or before.rstrip(" ").endswith(_SENTENCE_END)
    conditions: dict[str, bool] = {
        "space": not word,
        "digits": word[:1].isdigit(),
        "punctuation": not any(c.isalnum() for c in word),
        "subword": continues_word,
        "function": not after[:1].isalpha() and letters.lower() in _FUNCTION_WORDS,
        "name": letters[:1].isupper() and not begins_sentence,
    }
    return next((name for name, holds in conditions.items() if holds), "other")
