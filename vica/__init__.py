"""ViCA: vision-only cross-attention for LLaVA-like models.

model, processor = vica.load("path/or/repo", t2v_layers=[0, 1, 7, 8, 9, 10, 11, 14])
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .data.processor import ViCAProcessor
from .loading import convert, load
from .model.cache import ViCACache
from .model.llava import ViCAForConditionalGeneration
from .plan.config import IMAGE_TOKEN_INDEX, ViCAConfig
from .utils.errors import ViCAError

__version__ = "0.1.0"
__all__ = [
    "IMAGE_TOKEN_INDEX",
    "ViCACache",
    "ViCAConfig",
    "ViCAError",
    "ViCAForConditionalGeneration",
    "ViCAProcessor",
    "convert",
    "load",
]

AutoConfig.register(ViCAConfig.model_type, ViCAConfig)
AutoModelForImageTextToText.register(ViCAConfig, ViCAForConditionalGeneration)
AutoProcessor.register(ViCAConfig, ViCAProcessor)
