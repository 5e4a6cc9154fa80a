"""What changes the weights or the memory of all nodes at once, and brings back who missed it."""
