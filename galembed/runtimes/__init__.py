"""Runtimes: a backbone made ready to embed, behind one small protocol."""

from galembed.runtimes.choice import RUNTIMES, Choice, choose_runtime, open_runtime
from galembed.runtimes.protocol import Embedded, Runtime, check_images, doors

__all__ = ["RUNTIMES", "Choice", "Embedded", "Runtime", "check_images", "choose_runtime", "doors", "open_runtime"]
