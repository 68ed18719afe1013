"""Two served versions side by side: paired load, throughput blocks, and a verdict that stays valid under peeking."""

from redpp_serve.comparison.client import Endpoint, Payload
from redpp_serve.comparison.compare import Comparison, compare_endpoints

__all__ = ["Comparison", "Endpoint", "Payload", "compare_endpoints"]
