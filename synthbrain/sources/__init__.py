"""Where volumes that exist somewhere are fetched from."""

from synthbrain.sources.base import Cost, Source
from synthbrain.sources.folder import FolderSource

__all__ = ["Cost", "FolderSource", "Source"]
