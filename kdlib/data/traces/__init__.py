"""What a teacher wrote: prompts in, shards of traces out, and reading them back."""

from __future__ import annotations

from kdlib.data.traces.index import Shard, Skipped, TraceIndex
from kdlib.data.traces.prompts import Prompt, Prompts, read_prompts
from kdlib.data.traces.reader import read_traces
from kdlib.data.traces.writer import Batch, TraceWriter

__all__ = ["Batch", "Prompt", "Prompts", "Shard", "Skipped", "TraceIndex", "TraceWriter", "read_prompts", "read_traces"]
