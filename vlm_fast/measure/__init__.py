"""What a call takes: time in turns with its alternatives, memory, waits; on a GPU or a CPU."""
