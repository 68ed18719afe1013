"""Engines that run a whole network on the serving device, behind one small interface."""

from redpp_serve.engines.engine import ENGINES, ON_CPU, OWN, Engine, Session

__all__ = ["ENGINES", "ON_CPU", "OWN", "Engine", "Session"]
