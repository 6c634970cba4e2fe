"""One decoding step captured as a CUDA graph and replayed for every token.

On a GPU, launching the kernels of a step takes longer than running them for a few texts. A graph
launches all of them at once. It requires a cache of fixed address and size.
"""

import logging
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from hyperfitting.decoding.backends.base import CachedModel
from hyperfitting.decoding.backends.plain import PlainBackend
from hyperfitting.decoding.cache import has_full_attention
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.errors import exhausted_resource
from hyperfitting.runtime.distributed import is_on_one_device

log = logging.getLogger(__name__)
_not_capturable: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose decoding step cannot be captured, such as OPT, which reads tensors on the host."""


class CudaGraphBackend(PlainBackend):
    """Greedy decoding and sampling on one GPU, over a static cache."""

    def supports(
        self, model: PreTrainedModel, decode: DecodeConfig, n_rows: int, n_steps: int
    ) -> bool:
        """Return whether the model is on one GPU and its rows keep their places."""
        return (
            model.device.type == "cuda"
            and decode.strategy in ("greedy", "sample")
            and model not in _not_capturable
            and is_on_one_device(model)
            and has_full_attention(model)
        )

    def start(self, model: PreTrainedModel, max_length: int) -> CachedModel:
        """Return the model with a static cache and a graph yet to be captured."""
        # the last token is never an input
        cache = StaticCache(config=model.config, max_cache_len=max_length - 1)
        return CudaGraphStep(model, cache)


class CudaGraphStep(CachedModel):
    """A model whose steps of one token per text are graph replays.

    The first step runs eagerly, is captured, and its replay is compared with the eager logits. If
    they differ, or capturing fails, all steps run eagerly, with a warning in the log, and later
    batches use another backend.

    Args:
        model: in evaluation mode.
        cache: empty.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticCache) -> None:
        super().__init__(model, cache)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._tried = model.device.type != "cuda"
        self._tokens = self._logits = torch.empty(0)  # static inputs and outputs of the graph

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append tokens (B, T) to the cache; return the next-token logits (B, V), float32."""
        if tokens.shape[1] != 1:
            return super().__call__(tokens)
        if not self._tried:
            self._tried = True
            return self._capture(tokens)
        if self.graph is None:
            return super().__call__(tokens)
        self._tokens.copy_(tokens)
        self.graph.replay()
        return self._logits.clone()

    def _capture(self, tokens: Tensor) -> Tensor:
        self._tokens = tokens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
            expected = super().__call__(self._tokens).clone()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # the outer context restores the stream if ending the capture raises
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self._logits = super().__call__(self._tokens)
            self._rewind()
            graph.replay()
            if not torch.allclose(self._logits, expected, rtol=1e-2, atol=1e-2):
                raise RuntimeError("its logits differ")
        except RuntimeError as error:
            log.warning("CUDA graph capture failed (%s): decoding eagerly", error)
            if exhausted_resource(error) is None:  # smaller batches may have the memory
                _not_capturable.add(self._model)
            self._rewind()
            return super().__call__(tokens)
        self.graph = graph
        return self._logits.clone()

    def _rewind(self) -> None:
        """Remove the last token of each text from the cache."""
        for layer in self._filled_cache().layers:
            layer.cumulative_length.sub_(1)
