"""What dpguard changes in the host: one file per thing that is patched."""
