"""The pass of all rows of a comparison over one token, replayed as a CUDA graph where that is possible."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from .batch import DecodeBatch
from .intercept import last_logits

_log = logging.getLogger(__name__)


class DecodePass:
    """One token of every row through the model.

    The first pass runs as it is (it compiles kernels and allocates); the second is recorded, if
    :attr:`DecodeBatch.can_be_recorded`, and replayed from then on. A small model's step is thousands of short kernels,
    which a GPU runs faster than a host can launch them.
    """

    def __init__(self, model: PreTrainedModel, batch: DecodeBatch) -> None:
        self._model, self._batch = model, batch
        self._tokens = torch.zeros(batch.num_policies * batch.texts, 1, dtype=torch.int64, device=batch.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    def __call__(self, step: int, tokens: torch.Tensor) -> torch.Tensor:
        """Decode the tokens [rows] of a step; returns their logits [rows, V] fp32, valid until the next call."""
        self._tokens.copy_(tokens[:, None])
        self._batch.begin(step)
        if step == 1 and self._batch.can_be_recorded:
            self._record()
        if self._graph is None:
            self._logits = self._forward()
        else:
            self._graph.replay()
        self._batch.show(step)
        return self._logits

    def _forward(self) -> torch.Tensor:
        position = self._batch.position.expand(self._tokens.shape)
        logits = last_logits(self._model, self._tokens, position, self._batch.decode())
        self._batch.tally()
        return logits

    def _record(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._forward()
        except RuntimeError as error:  # a model may ask the device for a value, which no graph can hold
            _log.warning("decoding without a CUDA graph, which is slower: %s", error)
            return
        self._graph = graph
