"""From a pruned network to a folder that two servers can serve: archives, model repository, texts, trial runs, report.

`package.package` is the entry point. Nothing is imported here, since servers need only parts of this package.
"""
