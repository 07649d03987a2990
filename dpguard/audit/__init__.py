"""What dpguard observes: each file is one kind of check; values are collected asynchronously."""
