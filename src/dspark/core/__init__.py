"""The algorithm as pure functions: sampling, verification, planning, and the slow reference loop."""
