"""ViCA: vision-only cross-attention for LLaVA-like models.

model, processor = vica.load("path/or/repo", t2v_layers=[0, 1, 7, 8, 9, 10, 11, 14])
"""

from typing import TYPE_CHECKING

from .auto import register_when_imported
from .utils.lazy import lazy_names

if TYPE_CHECKING:
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

# torch and transformers take seconds to import: `vica --help` needs neither.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "IMAGE_TOKEN_INDEX": ".plan.config",
        "ViCACache": ".model.cache",
        "ViCAConfig": ".plan.config",
        "ViCAError": ".utils.errors",
        "ViCAForConditionalGeneration": ".model.llava",
        "ViCAProcessor": ".data.processor",
        "convert": ".loading",
        "load": ".loading",
    },
)

register_when_imported()
