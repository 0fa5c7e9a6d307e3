"""Answer many requests fast: `Engine(model, processor).generate([Request.ask("...", ["picture.png"])])`."""

from .engine import Engine
from .request import Request, Result, Token

__all__ = ["Engine", "Request", "Result", "Token"]
