"""What Lamella itself offers, declared as methods are: a command is a file of that name, or a folder."""
