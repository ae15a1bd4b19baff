"""What stands on the core: a file for each command or concern."""
