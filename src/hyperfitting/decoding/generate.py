"""Continue contexts with a model: batched loops over its key-value cache.

The contexts of one call have one length, so nothing is padded. Greedy and sampled texts grow by one
token at a time; beam search and contrastive search keep several candidates a text. All of them pass
their scores through the same constraints. Nothing here knows about tokenizers or files.
"""

import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hyperfitting import memory
from hyperfitting.config import DecodeConfig
from hyperfitting.decoding.blocker import CitationBlocker
from hyperfitting.decoding.cache import bytes_per_token, cache_for
from hyperfitting.decoding.constraints import forbid_repeated_ngrams, penalise_repetition
from hyperfitting.decoding.packed import packed
from hyperfitting.decoding.recorded import RecordedStep, static_cache_for
from hyperfitting.decoding.sampling import sample, streams
from hyperfitting.distributed import in_one_place
from hyperfitting.errors import UserError
from hyperfitting.metrics.distribution import CHOICE_MEASURES, choice_measures
from hyperfitting.progress import Advance

Tokens = NDArray[np.int32]
_MOST_ROWS = {"cpu": 64, "cuda": 512}
"""Texts continued at once where memory has room for more, by kind of device."""
_RECORDED = ("cuda",)
"""Kinds of device on which a step is recorded once and played again."""
_SHARE = 0.5
"""Share of the free memory that a batch may take."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continued:
    """Continuations of N contexts."""

    tokens: list[list[int]]
    """N lists of ids: ``new_tokens`` each, or fewer where a text was let end."""
    measures: dict[str, NDArray[np.float32]]
    """For each of `CHOICE_MEASURES` (N, new_tokens): of the model's distribution before anything
    was forbidden or cut off, and of the token chosen from it. NaN past the end of a text."""


@torch.inference_mode()
def continue_texts(
    model: PreTrainedModel,
    contexts: Tokens,
    new_tokens: int,
    decode: DecodeConfig,
    batch_size: int | None = None,
    advance: Advance | None = None,
    blocker: CitationBlocker | None = None,
) -> Continued:
    """Return a continuation of each context, in their order.

    Args:
        model: a causal language model in evaluation mode.
        contexts: (N, T) token ids, T at least 1.
        new_tokens: length of a continuation, in tokens.
        decode: how tokens are chosen.
        batch_size: contexts continued at once, at most; it changes the speed, not the texts. None:
            as many as memory has room for, and are of use.
        advance: told of every new token.
        blocker: forbids what would go on with the training data.

    Raises:
        FloatingPointError: the model's logits hold NaN or infinity.
        UserError: all tokens are forbidden, so that no text can go on.
        ValueError: the contexts are empty.
    """
    if contexts.shape[1] == 0:
        raise ValueError("a context has 1 token or more; these have none")
    eos = end_tokens(model)
    tokens: list[list[int]] = []
    measures: list[NDArray[np.float32]] = [
        np.empty((len(CHOICE_MEASURES), 0, new_tokens), np.float32)
    ]
    candidates = decode.candidates
    size = evenly(
        len(contexts), batch_size or fitting(model, contexts.shape[1] + new_tokens, candidates)
    )
    steps = math.ceil(len(contexts) / size) * new_tokens
    with packed(model, size * candidates, steps):
        while len(tokens) < len(contexts):
            batch = contexts[len(tokens) : len(tokens) + size]
            try:
                decoder = _Decoder(model, decode, eos, blocker, advance)
                made, found = decoder.run(batch, new_tokens)  # (B, new), (M, B, new)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = math.ceil(size / 2)
                log.warning("out of GPU memory: continuing %d texts at once", size)
                continue
            for row, text in enumerate(made.tolist()):
                tokens.append(_until(text, eos) if decode.stop_at_eos else text)
                found[:, row, len(tokens[-1]) :] = torch.nan
            measures.append(found.cpu().numpy())
    whole = np.concatenate(measures, axis=1)
    return Continued(tokens, dict(zip(CHOICE_MEASURES, whole, strict=True)))


def fitting(model: PreTrainedModel, length: int, candidates: int) -> int:
    """Return how many texts are best continued at once: the more the faster, if memory has room.

    Args:
        model: on its device.
        length: tokens of a context and its continuation.
        candidates: rows that one text takes.
    """
    most = _MOST_ROWS.get(model.device.type, 64)
    # the cache, and some copies of the logits in float32
    row = bytes_per_token(model) * length + 8 * 4 * model.config.vocab_size
    room = int(_SHARE * memory.free(model.device) // row)
    return max(1, min(most, room) // candidates)


def evenly(n: int, most: int) -> int:
    """Return the size of a batch, if ``n`` texts are shared out evenly to as few as can be."""
    return math.ceil(n / math.ceil(n / most)) if n else 1


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids that end a text, from the model's own generation settings."""
    eos = model.generation_config.eos_token_id if model.can_generate() else None
    if eos is None:
        eos = model.config.eos_token_id
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    return [i for i in ids if 0 <= i < model.config.vocab_size]


def _until(tokens: list[int], eos: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0]] if ends else tokens


class _Rows:
    """Texts that grow together: their tokens, and what the model thought at each step."""

    def __init__(self, contexts: Tensor, new_tokens: int) -> None:
        rows, self.start = contexts.shape
        self.length = self.start
        space = contexts.new_empty(rows, new_tokens)
        self._tokens = torch.cat([contexts, space], dim=1)  # (R, T + new)
        self._measures = torch.empty(
            len(CHOICE_MEASURES), rows, new_tokens, device=contexts.device
        )  # (M, R, new)

    @property
    def history(self) -> Tensor:
        """All tokens so far: (R, length)."""
        return self._tokens[:, : self.length]

    def append(self, tokens: Tensor, logits: Tensor) -> None:
        """Add one token (R,) to each text, chosen from the model's own logits (R, V)."""
        step = self.length - self.start
        self._tokens[:, self.length] = tokens
        self._measures[:, :, step] = choice_measures(logits, tokens)
        self.length += 1

    def select(self, rows: Tensor) -> None:
        """Become the texts of these rows."""
        self._tokens, self._measures = self._tokens[rows], self._measures[:, rows]

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the continuations (R, new) and their measures (M, R, new).

        Raises:
            FloatingPointError: the model's logits held NaN or infinity.
        """
        wrong = torch.isnan(self._measures).any(0).any(0).nonzero()
        if len(wrong):
            raise FloatingPointError(
                "the logits hold NaN or infinity: there is no distribution "
                f"(NaN at new token {int(wrong[0]) + 1})"
            )
        return self._tokens[:, self.start :], self._measures


class _Decoder:
    """One batch on its way through the model, by any strategy."""

    def __init__(
        self,
        model: PreTrainedModel,
        decode: DecodeConfig,
        eos: list[int],
        blocker: CitationBlocker | None,
        advance: Advance | None,
    ) -> None:
        self._model, self._decode, self._eos = model, decode, eos
        self._blocker = blocker
        self._advance = advance
        self._cache: Cache | None = None
        self._step: RecordedStep | None = None
        # of a context only the last position is needed, and all of them may not fit into memory
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if last_only else {}

    def run(self, contexts: Tokens, new_tokens: int) -> tuple[Tensor, Tensor]:
        """Return new tokens (B, new_tokens) and their measures (M, B, new_tokens)."""
        device = next(self._model.parameters()).device
        given = torch.as_tensor(contexts, dtype=torch.long, device=device)  # (B, T)
        self._cache = cache_for(self._model, contexts.shape[1] + new_tokens)
        if self._decode.strategy == "beam":
            return self._beam(given, new_tokens)
        if self._decode.strategy == "contrastive":
            return self._contrastive(given, new_tokens)
        if device.type in _RECORDED and in_one_place(self._model):
            static = static_cache_for(self._model, contexts.shape[1] + new_tokens)
            if static is not None:
                self._cache, self._step = static, RecordedStep(self._model, static, self._options)
        return self._one_by_one(given, new_tokens, self._chooser(contexts, new_tokens))

    def _chooser(self, contexts: Tokens, new_tokens: int) -> Callable[[Tensor, int], Tensor]:
        """Return the function of scores (B, V) and step that chooses tokens (B,)."""
        if self._decode.strategy == "greedy":
            return lambda scores, step: scores.argmax(dim=-1)
        u = streams(self._decode.seed, contexts, new_tokens)
        return lambda scores, step: sample(
            scores, self._decode, torch.as_tensor(u[:, step], device=scores.device)
        )

    def _one_by_one(
        self, given: Tensor, new_tokens: int, choose: Callable[[Tensor, int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        rows = _Rows(given, new_tokens)
        for step in range(new_tokens):
            logits = self._forward(given)
            scores = self._constrained(logits, rows)
            chosen = choose(scores, step)
            self._go_on(scores.gather(1, chosen.unsqueeze(1)), rows)
            rows.append(chosen, logits)
            given = chosen.unsqueeze(1)  # (B, 1)
            self._tell(len(chosen))
        return rows.result()

    def _beam(self, given: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
        """Keep the likeliest texts at each step, and return the likeliest a token at the end.

        A text that may end and has ended keeps its place by its score, and grows no more.
        """
        texts, width = len(given), self._decode.num_beams
        rows = _Rows(given.repeat_interleave(width, 0), new_tokens)  # (B * width, …)
        score = given.new_full((texts, width), -torch.inf, dtype=torch.float32)
        score[:, 0] = 0  # all beams of a text are the same yet
        ended = torch.zeros(texts * width, dtype=torch.bool, device=given.device)
        lengths = torch.zeros(texts * width, device=given.device)
        first = torch.arange(texts, device=given.device).unsqueeze(1) * width
        logits = self._forward(given).repeat_interleave(width, 0)
        cache = self._filled()
        cache.batch_repeat_interleave(width)
        for step in range(new_tokens):
            scores = self._constrained(torch.log_softmax(logits, -1), rows, ended)
            size = scores.shape[-1]
            total = (score.view(-1, 1) + scores).view(texts, width * size)
            score, best = total.topk(width, dim=-1)  # (B, width)
            self._go_on(score[:, 0], rows)
            source = (first + best // size).flatten()
            chosen = (best % size).flatten()
            rows.select(source)
            rows.append(chosen, logits[source])
            lengths, ended = lengths[source] + ~ended[source], ended[source]
            if self._decode.stop_at_eos:
                ended = ended | torch.isin(chosen, chosen.new_tensor(self._eos))
            self._tell(texts)
            if step + 1 < new_tokens:
                cache.reorder_cache(source)
                logits = self._forward(chosen.unsqueeze(1))
        best = (score / lengths.view(texts, width)).argmax(-1, keepdim=True)
        rows.select((first + best).flatten())
        return rows.result()

    def _contrastive(self, given: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
        """Weigh the probability of each candidate against its likeness to all tokens before it.

        Likeness is the highest cosine of its last hidden state with theirs. Every candidate takes
        one forward pass of its own (Su et al., 2022).
        """
        texts, k, alpha = len(given), int(self._decode.top_k or 0), self._decode.alpha
        rows = _Rows(given, new_tokens)
        logits, states = self._forward_with_states(given)  # (B, V), (B, T, H)
        k = min(k, logits.shape[-1])
        first = torch.arange(texts, device=given.device) * k
        cache = self._filled()
        cache.batch_repeat_interleave(k)
        for _ in range(new_tokens):
            scores = self._constrained(logits, rows)
            p, ids = torch.softmax(scores, -1).topk(k, dim=-1)  # (B, k)
            self._go_on(scores.gather(1, ids[:, :1]), rows)
            ahead, state = self._forward_with_states(ids.view(-1, 1))  # (B * k, V), (B * k, 1, H)
            likeness = torch.einsum("bkh,bth->bkt", state.view(texts, k, -1), states).amax(-1)
            worth = ((1 - alpha) * p - alpha * likeness).masked_fill(p == 0, -torch.inf)
            best = worth.argmax(-1)  # (B,)
            rows.append(ids.gather(1, best.unsqueeze(1)).squeeze(1), logits)
            source = first + best
            cache.reorder_cache(source.repeat_interleave(k))
            logits, states = ahead[source], torch.cat([states, state[source]], dim=1)
            self._tell(texts)
        return rows.result()

    def _filled(self) -> Cache:
        """Return the cache that the contexts are in."""
        if self._cache is None:
            raise TypeError(f"{type(self._model).__name__} keeps no cache of keys and values")
        return self._cache

    def _forward(self, given: Tensor) -> Tensor:
        """Return the next-token logits (B, V) after tokens (B, T), which enter the cache."""
        if self._step is not None and given.shape[1] == 1:
            return self._step(given)
        output = self._model(
            input_ids=given, past_key_values=self._cache, use_cache=True, **self._options
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _forward_with_states(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, V), and the last hidden states (B, T, H) at length 1."""
        output = self._model(
            input_ids=given,
            past_key_values=self._cache,
            use_cache=True,
            output_hidden_states=True,
            **self._options,
        )
        self._cache = output.past_key_values
        states = torch.nn.functional.normalize(output.hidden_states[-1].float(), dim=-1)
        return output.logits[:, -1].float(), states

    def _constrained(self, scores: Tensor, rows: _Rows, ended: Tensor | None = None) -> Tensor:
        """Return scores (B, V) with -inf for what may not come next; ``ended`` rows only end."""
        decode = self._decode
        scores = scores.clone()
        if decode.repetition_penalty != 1:
            scores = penalise_repetition(scores, rows.history, decode.repetition_penalty)
        if decode.no_repeat_ngram is not None:
            scores = forbid_repeated_ngrams(scores, rows.history, decode.no_repeat_ngram)
        if self._blocker is not None:
            scores = self._blocker(scores, rows.history, rows.start)
        if not decode.stop_at_eos:
            scores[:, self._eos] = -torch.inf
        elif ended is not None and bool(ended.any()):
            scores[ended] = -torch.inf
            scores[ended, self._eos[0]] = 0
        return scores

    def _go_on(self, best: Tensor, rows: _Rows) -> None:
        """Refuse to go on if what was chosen for a text, its scores (B, …), is forbidden itself."""
        if bool(torch.isneginf(best).any()):
            decode = self._decode
            raise UserError(
                f"every token is forbidden after {rows.length - rows.start} new ones: "
                "no text can go on",
                field="decode.no_repeat_ngram, decode.citation_blocker.n",
                value=f"{decode.no_repeat_ngram}, {decode.citation_blocker.n}",
                hint="a longer n-gram for each, or decode.stop_at_eos=true",
            )

    def _tell(self, n: int) -> None:
        if self._advance:
            self._advance(n)
