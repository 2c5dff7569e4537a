"""What keeps a run going through faults: bad steps, preemption, hangs, lost processes; and fault injection."""
