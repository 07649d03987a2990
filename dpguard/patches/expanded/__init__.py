"""Models whose rows torch computes itself (expanded weights): left alone, and looked at."""
