"""Finds, in Python source, the loaders that can run code."""

import ast

LOADERS = {"torch.load", "torch.jit.load", "torch.export.load", "pickle.load", "pickle.loads", "yaml.load"}
LOADERS |= {"yaml.unsafe_load", "yaml.full_load"}
UNPICKLERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def loads(source: str) -> list[str]:
    """Every use of a loader that can run code, in calls, imports and arguments; text and comments do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if name in LOADERS or node.module in UNPICKLERS]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if refused else ["allow_pickle"]
    return found
