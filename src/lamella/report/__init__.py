"""What people look at: figures as data, how they are drawn, and pages that need no network."""
