"""Programs to copy from: ordinary PyTorch and Opacus code that knows nothing of dpguard."""
