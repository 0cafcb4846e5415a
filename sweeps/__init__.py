"""Plans the work and runs it on Ray."""
