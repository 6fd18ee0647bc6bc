"""Times on a CUDA device: events, graphs, peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from roofline import Device

WARM_UP = 5


def device_of(index: int = 0) -> Device:
    """The properties that bound the loss, from the driver."""
    found = torch.cuda.get_device_properties(index)
    return Device(
        found.multi_processor_count, 1e3 * found.clock_rate, 10 * found.major + found.minor
    )


def event_median_ms(run: Callable[[], object], seconds: float) -> float:
    """Median device time of one call in ms, between CUDA events, after a warm-up.

    Each call is enclosed by its own pair of events; the host is waited for once, at the end.
    """
    for _ in range(WARM_UP):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    rounds = max(5, min(500, int(1e3 * seconds / max(begin.elapsed_time(end), 1e-3))))
    pairs = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def graph_median_ms(run: Callable[[], object], seconds: float) -> float | str:
    """The same for replays of a captured CUDA graph; a sentence where it cannot be captured."""
    stream = torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return event_median_ms(graph.replay, seconds)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return f"cannot be captured: {str(error).splitlines()[0][:120]}"


def peak_extra_mib(run: Callable[[], object]) -> float:
    """Highest memory torch holds on the device during one call, beyond what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return round((peak - before) / 2**20, 3)
