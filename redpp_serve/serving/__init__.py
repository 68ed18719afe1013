"""Real model servers on this machine: started, stopped, found again, probed, and switched between versions."""
