"""What dpguard changes in the host, by what is patched; one file per thing."""
