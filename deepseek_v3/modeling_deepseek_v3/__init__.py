"""The architecture: latent attention, DeepSeekMoE, Multi-Token Prediction, and the models made of them."""

from .cache import LatentCache
from .heads import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification
from .model import DeepseekV3Model, DeepseekV3PreTrainedModel

__all__ = [
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
    "LatentCache",
]
