"""What the commands do, as Python calls: a module for each job, which has the name of its function."""
