"""Engines that run a whole network on the serving device, behind one small interface."""

from redpp_serve.engines.engine import ENGINES, OWN, Engine, Session

__all__ = ["ENGINES", "OWN", "Engine", "Session"]
