"""Starting and stopping real model servers on this machine, for the demo, the comparison and the tests."""
