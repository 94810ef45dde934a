"""PhyAugPipe: from captioned clips to groups of one real and several generated videos (PhyGDPO)."""

from .sampling import allocate


__all__ = ["allocate"]
