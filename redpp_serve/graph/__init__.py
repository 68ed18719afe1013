"""The network as data: graph, operators, executor, passes, and the artifact file. Needs torch alone."""
