"""The published systems, one file or one folder for each, under its slug."""
