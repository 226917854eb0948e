"""Streaming: volumes straight from packs, for those without room for a store."""

from synthbrain.stream.dataset import SynthBrainStream
from synthbrain.stream.order import stream_order
from synthbrain.stream.sampler import StreamSampler

__all__ = ["StreamSampler", "SynthBrainStream", "stream_order"]
