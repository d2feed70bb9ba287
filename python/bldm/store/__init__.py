"""A folder of packed latents: written once, memory-mapped, streamed, or resident on a GPU."""

from .encode import encode_dataset
from .layout import Column
from .reader import Damage, LatentStore
from .resident import ResidentLatents
from .stream import LatentStream
from .writer import StoreWriter

__all__ = ["Column", "Damage", "LatentStore", "LatentStream", "ResidentLatents", "StoreWriter", "encode_dataset"]
