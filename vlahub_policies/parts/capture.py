"""A function of tensors as one CUDA graph per shape: a small model's many short kernels then cost no launches from Python."""

from collections.abc import Callable, Mapping

import torch

KEPT = 8  # graphs of different shapes that are kept


class Captured:
    """Calls `function(inputs)`, a dict of tensors -> a dict of tensors, through a CUDA graph that is captured at the first call with each set of shapes.

    The function must only do tensor work: no look at a value, no copy from the host. Its parameters must stay where they are in memory (their values may change).
    """

    def __init__(self, function: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]):
        self.function = function
        self._pool = torch.cuda.graph_pool_handle()  # graphs run one after another, so they share their memory
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        casts = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        shapes = (casts, *((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items()))
        if shapes not in self._graphs:
            while len(self._graphs) >= KEPT:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[shapes] = self._capture(inputs)
        graph, given, outputs = self._graphs[shapes]
        for name, tensor in inputs.items():
            given[name].copy_(tensor)
        graph.replay()
        return {name: tensor.clone() for name, tensor in outputs.items()}  # the next replay overwrites them

    def _capture(self, inputs: Mapping[str, torch.Tensor]) -> tuple:
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast kept from outside the graph would go stale when the weights change
        torch.clear_autocast_cache()
        try:
            return self._record(given)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _record(self, given: dict[str, torch.Tensor]) -> tuple:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside the graph: libraries choose their kernels, compilation happens
            self.function(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self.function(given)
        return graph, given, outputs
