"""What is computed a second time: one person's share of a gradient, and what a loss couples."""
