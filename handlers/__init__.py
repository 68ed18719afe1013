"""What runs inside a model server: requests, preprocessing, metrics. Needs `runtime`; copied into each archive."""
