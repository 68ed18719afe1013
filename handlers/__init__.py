"""What runs inside a model server: request parsing, preprocessing, metrics. Needs `runtime`; copied into each archive."""
