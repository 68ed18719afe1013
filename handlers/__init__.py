"""Code that runs inside a model server: requests, preprocessing, metrics. Each archive carries a copy of it."""
