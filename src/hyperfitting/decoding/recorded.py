"""One step of decoding recorded as a CUDA graph, and played again for every token.

On a GPU a step of a few texts is over before Python has asked for the next operation. A graph asks
for all of them at once. It needs a cache whose place and size never change.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from hyperfitting.decoding.cache import cache_for

log = logging.getLogger(__name__)


class RecordedStep:
    """The next-token logits after one more token of each text.

    The first call runs the step as it is, records it, plays the record, and compares: if they do
    not agree, or a step cannot be recorded, it runs as it is from then on, and the log says so.

    Args:
        model: in evaluation mode.
        cache: holds the contexts; a `StaticCache`.
        options: of the model's forward pass.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticCache, options: dict[str, Any]) -> None:
        self._model, self._cache, self._options = model, cache, options
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tried = model.device.type != "cuda"
        self._tokens = self._logits = torch.empty(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return logits (B, V) after tokens (B, 1), which enter the cache."""
        if not self._tried:
            self._tried = True
            return self._record(tokens)
        if self._graph is None:
            return self._run(tokens)
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits.clone()

    def _run(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, **self._options
        ).logits[:, -1]
        return logits.float()

    def _record(self, tokens: Tensor) -> Tensor:
        self._tokens = tokens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries take their workspaces before the recording
            expected = self._run(self._tokens).clone()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._logits = self._run(self._tokens)
            self._go_back()
            graph.replay()
            if not torch.allclose(self._logits, expected, rtol=1e-2, atol=1e-2):
                raise RuntimeError("its logits differ")
        except RuntimeError as error:
            log.warning("a step of decoding cannot be recorded (%s): it runs as it is", error)
            self._go_back()
            return self._run(tokens)
        self._graph = graph
        return self._logits.clone()

    def _go_back(self) -> None:
        """Forget the last token of each text."""
        for layer in self._cache.layers:
            layer.cumulative_length.sub_(1)


def static_cache_for(model: PreTrainedModel, space: int) -> StaticCache | None:
    """Return a cache of a fixed place and size; none: blocks of this model need another kind."""
    if cache_for(model, space) is None:
        return None
    return StaticCache(config=model.config, max_cache_len=space)
