"""What is written: the audit log, each line chained to the one before."""
