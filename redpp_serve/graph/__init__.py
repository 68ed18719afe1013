"""The network as data: graphs, the executor that runs one, passes over them, and the artifact that stores one."""
