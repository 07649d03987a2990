"""What is noted while training runs: calls and rows, whose they are, and how batches were drawn."""
