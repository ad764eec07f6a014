"""Generation: the latent cache as `generate`'s default."""

from .mixin import LatentGenerationMixin

__all__ = ["LatentGenerationMixin"]
