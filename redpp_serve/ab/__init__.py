"""A live experiment: a gateway that splits or mirrors users' requests, and a running verdict on the pruned version."""
