"""Which scored groups a step is trained on. One method a file."""
