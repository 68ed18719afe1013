"""A/B tests on live traffic: a gateway that splits or mirrors users' requests, and a running verdict."""

from redpp_serve.ab.spec import Spec, TrafficSplit, parse_split

__all__ = ["Spec", "TrafficSplit", "parse_split"]
